"""The collective plugin ``torch``."""

from __future__ import annotations

from plugframe_builtins._shared.torch_collective.collective import ProcessGroupCollective


class TorchCollective(ProcessGroupCollective):
    """Send tensors and objects through a ``torch.distributed`` process group.

    An existing process group is used unchanged, and survives tear-down. Every collective on
    tensors first compares the calls of the ranks, so that a difference raises on all of them.

    Args:
        backend: a ``torch.distributed`` backend, ``"gloo"`` or by device ``"cpu:gloo,cuda:nccl"``; by default
            the accelerator's.
        timeout_s: timeout of a collective in seconds; by default ``--timeout``, else 1800.
    """
