"""The plugin: collectives over ``torch.distributed``."""

from __future__ import annotations

from plugframe_builtins._shared.torch_collective.collective import ProcessGroupCollective


class TorchCollective(ProcessGroupCollective):
    """Exchange tensors and objects through a ``torch.distributed`` process group.

    A process group that is initialised already is used as it is, and stays at tear-down. Every exchange of
    tensors first compares what the ranks are about to send, so that a difference is an error on all of them.

    Args:
        backend: a ``torch.distributed`` backend, ``"gloo"`` or by device ``"cpu:gloo,cuda:nccl"``; by default
            what the accelerator asks for.
        timeout_s: seconds an exchange may take before it is an error; by default ``--timeout``, else 1800.
    """
