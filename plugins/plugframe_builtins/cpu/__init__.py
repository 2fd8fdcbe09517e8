"""The CPU: always available, and shared by any number of ranks."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.cpu.accelerator:CPU",
    summary="The CPU; any number of processes share it.",
    devices=("cpu",),
    provides=("fork",),
    priority=0,
)
