"""Sharded checkpoints on torch.distributed.checkpoint: a folder with a file per rank."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.dcp_checkpoint.checkpoint:ShardedCheckpoint",
    summary="a folder to which every rank writes its shards, verified on load; saves in the background on request",
    provides=("sharded", "async"),
    requires=("safetensors",),
    priority=50,
    options=(
        Option(
            "layout", str, "plugframe", "The files' layout; torch's own tools read torch's.", ("plugframe", "torch")
        ),
    ),
)
