"""Simulated devices on torch's out-of-tree mechanism (PrivateUse1), in Python alone."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_pydevice.accelerator:PyDevice",
    summary="Simulated devices on the processor, an accelerator to torch; how many says PYDEVICE_COUNT.",
    devices=("pydevice",),
    tags=("gpu",),
    # Above every built-in one: who installs it wants it. An accelerator for real hardware says 100 or so.
    priority=200,
)
