"""Ranks connected by ``torch.distributed``."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.torch_collective.collective:TorchCollective",
    summary="torch.distributed: gloo, NCCL, XCCL or any backend registered with it.",
    priority=10,
    provides=("process-group",),
)
