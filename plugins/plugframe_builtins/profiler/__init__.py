"""A timeline of what a run spends its time on."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.profiler.profiler:Profiler",
    summary="A timeline of forwards, backwards, steps, batches, collectives and checkpoints, as a Chrome trace.",
)
