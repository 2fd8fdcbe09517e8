"""Skip optimizer steps on losses or gradients that are not finite, or end the run."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.nan_guard.extension:NaNGuard",
    summary="Skips optimizer steps on losses or gradients that are not finite on any rank, or raises.",
    options=(
        Option("action", str, "skip", "Skip the step, or raise on all ranks.", ("skip", "raise")),
        Option("max_in_a_row", int, 10, "Skipped steps in a row after which the run stops.", minimum=1),
    ),
)
