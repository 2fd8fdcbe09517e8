"""Retry steps that run out of memory in smaller micro-batches."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.oom_retry.extension:OomRetry",
    summary="A step that runs out of memory on any rank is run again by all, in halves of the batch.",
    # A rank that fails alone must not leave the others inside a collective.
    needs={"strategy": ("local-backward",)},
    options=(
        Option("min_micro_batch", int, 1, "Samples at a time that are never divided.", minimum=1),
        Option("micro_batch", int, None, "Initial number of samples at a time; unset: full batches.", minimum=1),
    ),
)
