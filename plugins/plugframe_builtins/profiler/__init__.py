"""Record a timeline of a run."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.profiler.profiler:Profiler",
    summary="A timeline of forwards, backwards, steps, batches, collectives and checkpoints, as a Chrome trace.",
    options=(
        Option("path", str, "plugframe-trace.json", "The file; an existing one is replaced."),
        Option("max_events", int, 200_000, "Number of events to keep, the first ones.", minimum=1),
        Option("synchronize", bool, False, "Synchronize the device before every clock reading."),
    ),
)
