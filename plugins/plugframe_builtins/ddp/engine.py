"""What DDP keeps beside a module: ``DistributedDataParallel`` over the user's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parallel import DistributedDataParallel

from plugframe.base import ForwardShim
from plugframe_builtins.ddp.unused import torchs_missing, without_gradient

_LOOK = attrgetter("requires_grad", "dtype")


def _return(loss: Tensor) -> Tensor:
    return loss


class Registrations:
    """Counts parameters and modules that were put into any module: a model may have got other parameters since."""

    def __init__(self) -> None:
        self.count = 0

    def watch(self) -> Callable[[], None]:
        """Begin to count; return what ends it."""
        handles = (
            register_module_parameter_registration_hook(self._note),
            register_module_module_registration_hook(self._note),
        )

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end

    def _note(self, module: nn.Module, name: str, value: Any) -> None:
        self.count += 1


class Engine:
    """``engine(call, *args)`` runs ``call(*args)`` so that the backward after it averages gradients.

    A forward without gradients is the call alone and never communicates: ranks may evaluate different
    numbers of batches, or one of them by itself.

    Attributes:
        broadcast_buffers: whether buffers are made equal before each forward.
        stale_buffers: whether a forward may have changed the buffers since they were equal.
        local: whether gradients were accumulated that were not averaged since.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        connect: Callable[[nn.Module], DistributedDataParallel],
        check: Callable[[nn.Module], None],
        registrations: Registrations,
    ) -> None:
        self.module = module
        self._registrations = registrations
        self._check = check
        self.broadcast_buffers = True
        self.stale_buffers = False
        self.local = False
        self._connect = connect
        self._ddp: DistributedDataParallel | None = None
        self._averages = True
        self._must_average = False
        self._expects = self._ran = self._awaits = False
        self._parameters: list[nn.Parameter] = []
        self._trained: list[nn.Parameter] = []
        self._looks: tuple[Any, ...] = ()
        self._seen = 0
        self._build()

    def __del__(self) -> None:
        self.disconnect()

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        if not torch.compiler.is_compiling() and self._changed():
            self._check(self.module)
            self._build()
        ddp = self._ddp
        if ddp is None:
            return call(*args, **kwargs)
        self.stale_buffers = self._has_buffers
        ddp.broadcast_buffers = self.broadcast_buffers
        ddp.require_backward_grad_sync = self._expects = self._averages or self._must_average
        self._ran = True
        self._must_average = False
        try:
            return ddp(call, *args, **kwargs)
        except RuntimeError as error:
            missing = torchs_missing(error, self.module)
            if not missing:
                raise
            raise without_gradient(missing) from None

    def before_backward(self, loss: Tensor) -> None:
        """Have the backward that comes average gradients, whatever went before.

        torch expects one backward for each forward: gradients of a second one, or of a part that was called by
        itself, it would leave to each rank.
        """
        ddp = self._ddp
        if ddp is None:
            return
        unused_fits = ddp.static_graph or ddp.find_unused_parameters
        self._awaits = self._averages and not unused_fits
        if self._averages:
            # What is unused depends on the loss: of several, none may use all that the forward has made.
            if not ddp.static_graph and (ddp.find_unused_parameters or not self._expects):
                ddp.broadcast_buffers, ddp.require_backward_grad_sync = False, True
                ddp(_return, loss)  # to torch, a forward whose result is the loss
            self.local = self.local and not self._ran
        elif self._ran:
            self.local = not self._expects
        self._expects = self._ran = False

    def after_backward(self) -> None:
        """Refuse a backward that left some parameters without a gradient: other ranks wait for it, for ever.

        Raises:
            CollectiveMismatchError: naming the first of them.
        """
        if not self._awaits:
            return
        self._awaits = False
        if all(parameter.grad is not None for parameter in self._trained):
            return
        trained = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        missing = [name for name, parameter in trained if parameter.grad is None]
        # A model that had no part in this loss at all may have one in the next.
        if missing and len(missing) < len(trained):
            raise without_gradient(missing)

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Say whether the optimizer updates any parameter of the module."""
        return any(id(p) in self._owned for group in optimizer.param_groups for p in group["params"])

    @contextmanager
    def synchronizing(self, enabled: bool) -> Iterator[None]:
        """Have forwards and backwards average gradients, or not; on leaving, what held before holds again.

        Averaging one micro-batch early changes nothing in the end: the mean over ranks is linear.
        """
        before, self._averages = self._averages, enabled
        try:
            yield
        finally:
            self._averages = before

    @torch.no_grad()
    def sync_buffers(self) -> None:
        """Give every rank the buffers of rank 0, in one broadcast for each dtype."""
        self.stale_buffers = False
        if self._ddp is None:
            return
        group = self._ddp.process_group
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.module.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        for buffers in by_dtype.values():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            dist.broadcast(flat, 0, group=group)
            if dist.get_rank(group) != 0:
                pieces = torch.split(flat, [buffer.numel() for buffer in buffers])
                for buffer, piece in zip(buffers, pieces, strict=True):
                    buffer.copy_(piece.view_as(buffer))

    def _changed(self) -> bool:
        """Say whether parameters were frozen, unfrozen, converted or replaced since the module was looked at."""
        if self._registrations.count != self._seen:  # only then: walking through the modules takes long
            self._seen = self._registrations.count
            now = list(self.module.parameters())
            if len(now) != len(self._parameters) or any(a is not b for a, b in zip(now, self._parameters, strict=True)):
                return True
        return tuple(map(_LOOK, self._parameters)) != self._looks

    def _build(self) -> None:
        self.disconnect()
        self._seen = self._registrations.count
        self._parameters = list(self.module.parameters())
        self._looks = tuple(map(_LOOK, self._parameters))
        self._trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        # Adam's and SGD's parameter lists are looked through at every step.
        self._owned = frozenset(map(id, self._parameters))
        self._has_buffers = any(True for _ in self.module.buffers())
        if self._trained:
            self._ddp = self._connect(ForwardShim(self.module))
            # A static graph is recorded in the first backward, which torch cannot do without averaging.
            self._must_average = self._ddp.static_graph

    def disconnect(self) -> None:
        """Exchange nothing any more. What an exception holds would otherwise keep the other ranks waiting."""
        # The reducer must not be the last to hold the process group: it would destroy it without releasing the
        # GIL, and wait for gloo's threads, which may be waiting for the GIL (seen in 1 of 20 tear-downs).
        ddp, self._ddp = vars(self).get("_ddp"), None
        for name in ("logger", "reducer", "process_group") if ddp is not None else ():
            vars(ddp).pop(name, None)
