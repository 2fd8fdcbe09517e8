"""NVIDIA GPUs, and AMD's under ROCm, which torch calls cuda as well."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.cuda.accelerator:CUDA",
    summary="NVIDIA GPUs (and AMD GPUs under ROCm), one for each process.",
    devices=("cuda",),
    tags=("gpu",),
    priority=100,
)
