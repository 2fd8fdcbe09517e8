"""Log the learning rate."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.lr_monitor.extension:LRMonitor",
    summary="Adds the learning rate to what the script logs.",
)
