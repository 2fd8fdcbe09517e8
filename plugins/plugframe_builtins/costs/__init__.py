"""Report the time and memory of a run at its end."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.costs.costs:Costs",
    summary="At the end rank 0 tells where the time of a step went, and the memory of a rank.",
)
