"""One safetensors file per checkpoint, written by rank 0, with checksums for every byte."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.safetensors_checkpoint.checkpoint:SafetensorsCheckpoint",
    summary="one safetensors file, verified on load; also reads plain safetensors and torch.save files",
    requires=("safetensors",),
    priority=100,
)
