"""Report the time and memory of a run at its end."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.costs.costs:Costs",
    summary="Reports the time of each phase of a step, and the memory of a rank, at the end of a run.",
)
