"""What DDP keeps beside a module: ``DistributedDataParallel`` over the user's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plugframe.base import ForwardShim


class Engine(DistributedDataParallel):
    """``engine(call, *args)`` runs ``call(*args)`` so that the backward after it averages gradients.

    A forward without gradients is the call alone and never communicates: ranks may evaluate different
    numbers of batches, or one of them by itself.
    """

    def __init__(self, module: nn.Module, *, static_graph: bool, **options: Any) -> None:
        super().__init__(ForwardShim(module), static_graph=static_graph, **options)
        self.stale_buffers = False
        self._has_buffers = any(True for _ in module.buffers())
        # A static graph is recorded in the first backward, which torch cannot do without averaging.
        self._must_average = static_graph
        # Adam's and SGD's parameter lists are looked through at every step.
        self._owned = frozenset(map(id, module.parameters()))

    def __del__(self) -> None:
        # The reducer must not be the last to hold the process group: it would destroy it without releasing the
        # GIL, and wait for gloo's threads, which may be waiting for the GIL (seen in 1 of 20 tear-downs).
        for name in ("logger", "reducer"):
            vars(self).pop(name, None)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        self.stale_buffers = self._has_buffers
        self._must_average = False
        return super().forward(call, *args, **kwargs)  # type: ignore[no-untyped-call]

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Say whether the optimizer updates any parameter of the module."""
        return any(id(p) in self._owned for group in optimizer.param_groups for p in group["params"])

    @contextmanager
    def synchronizing(self, enabled: bool) -> Iterator[None]:
        """Have forwards and backwards average gradients, or not; on leaving, what held before holds again.

        Averaging one micro-batch early changes nothing in the end: the mean over ranks is linear.
        """
        before = self.require_backward_grad_sync
        self.require_backward_grad_sync = enabled or self._must_average
        try:
            yield
        finally:
            self.require_backward_grad_sync = before

    @torch.no_grad()
    def sync_buffers(self) -> None:
        """Give every rank the buffers of rank 0, in one broadcast for each dtype."""
        self.stale_buffers = False
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.module.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        for buffers in by_dtype.values():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            dist.broadcast(flat, 0, group=self.process_group)
            if dist.get_rank(self.process_group) != 0:
                pieces = torch.split(flat, [buffer.numel() for buffer in buffers])
                for buffer, piece in zip(buffers, pieces, strict=True):
                    buffer.copy_(piece.view_as(buffer))
