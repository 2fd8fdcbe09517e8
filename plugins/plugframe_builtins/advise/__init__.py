"""Report where the time of a step goes, and what to change."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.advise.extension:Advise",
    summary="Reports after some steps where their time goes, the memory, and what would make them faster.",
    options=(
        Option("steps", int, 50, "Steps to measure before the report.", minimum=1),
        Option("warm_up", int, 5, "Steps before those, which include one-time work.", minimum=1),
    ),
)
