"""NVIDIA GPUs, and AMD GPUs under ROCm, which torch also calls cuda."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.cuda.accelerator:CUDA",
    summary="NVIDIA GPUs (and AMD GPUs under ROCm), one for each process.",
    devices=("cuda",),
    tags=("gpu",),
    priority=100,
)
