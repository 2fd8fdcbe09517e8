"""What a run costs: time and memory, in a few lines at its end."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.costs.costs:Costs",
    summary="At the end rank 0 tells where the time of a step went, and the memory of a rank.",
)
