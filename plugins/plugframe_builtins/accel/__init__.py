"""Devices of ``torch.accelerator``."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.accel.accelerator:TorchAccelerator",
    summary="Whatever device torch.accelerator finds: Intel XPU, or one that a torch backend package adds.",
    tags=("gpu",),
    priority=50,
)
