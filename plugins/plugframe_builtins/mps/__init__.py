"""The GPU of a Mac."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.mps.accelerator:MPS",
    summary="The GPU of a Mac with Apple silicon; one process.",
    devices=("mps",),
    tags=("gpu",),
    priority=90,
)
