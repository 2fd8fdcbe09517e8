"""A process without a launcher: the only one so far."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.local.environment:Local",
    summary="This machine, with nothing started yet.",
    priority=0,
)
