"""Simulated devices on torch's out-of-tree mechanism (PrivateUse1), in pure Python."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_pydevice.accelerator:PyDevice",
    summary="Simulated devices on the CPU, as an accelerator of torch; PYDEVICE_COUNT sets their number.",
    devices=("pydevice",),
    tags=("gpu",),
    # Above every built-in accelerator, since it was installed deliberately. Use about 100 for real hardware.
    priority=200,
)
