"""Collectives over ``torch.distributed``."""

from plugframe import Plugin
from plugframe_builtins._shared.torch_collective.options import OPTIONS

plugin = Plugin(
    factory="plugframe_builtins.torch_collective.collective:TorchCollective",
    summary="torch.distributed: gloo, NCCL, XCCL or any backend registered with it.",
    priority=10,
    options=OPTIONS,
    provides=("process-group",),
    retired=dict.fromkeys(
        ("gloo", "nccl", "mpi", "xccl"), "that is a backend: use collective='torch' and its backend=."
    ),
)
