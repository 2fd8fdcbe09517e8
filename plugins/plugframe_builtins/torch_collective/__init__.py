"""Ranks connected by ``torch.distributed``."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.torch_collective.collective:TorchCollective",
    summary="torch.distributed: gloo, NCCL, XCCL or any backend registered with it.",
    priority=10,
    options=(
        Option("backend", str, None, "A backend of torch.distributed, or one by device: cpu:gloo,cuda:nccl."),
        Option("timeout_s", float, None, "Seconds an exchange may take; unset: --timeout, else 1800.", above=0),
    ),
    provides=("process-group",),
    retired=dict.fromkeys(
        ("gloo", "nccl", "mpi", "xccl"), "that is a backend: use collective='torch' and its backend=."
    ),
)
