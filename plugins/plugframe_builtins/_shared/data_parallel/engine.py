"""What DDP keeps beside a module: who takes part in the averaging of gradients, and when buffers are made equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plugframe.utils.registrations import Registrations
from plugframe_builtins._shared.broadcast import send_from_first
from plugframe_builtins._shared.data_parallel.buckets import DEFAULT_MIB, MIB, Send
from plugframe_builtins._shared.data_parallel.reducer import Backward, Reducer
from plugframe_builtins._shared.data_parallel.sparse import sparse_parameters

_LOOK = attrgetter("requires_grad", "dtype")


class Engine:
    """``engine(call, *args)`` runs ``call(*args)``; gradients are averaged by the backwards, however they came about.

    A forward without gradients is the call alone and never communicates: ranks may evaluate different
    numbers of batches, or one of them by itself.

    Args:
        group: the ranks.
        check: raises on all ranks if their models differ.
        registrations: counts changes of any module.
        backward: shared by the engines of a job.
        bucket_cap_mb: size of a bucket in MiB.
        as_views: whether gradients become views of the buckets.
        make_send: makes what sends a bucket in another way than whole.

    Attributes:
        broadcast_buffers: whether buffers are made equal before each forward.
        stale_buffers: whether a forward may have changed the buffers since they were equal.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        group: Any,
        check: Callable[[nn.Module], None],
        registrations: Registrations,
        backward: Backward,
        bucket_cap_mb: float | None = None,
        as_views: bool = False,
        make_send: Callable[[], Send] | None = None,
    ) -> None:
        self.module = module
        self.broadcast_buffers = True
        self.stale_buffers = False
        self._group = group
        self._alone = dist.get_world_size(group) == 1
        self._check = check
        self._registrations = registrations
        self._reducer = Reducer(
            group, backward, cap_bytes=(bucket_cap_mb or DEFAULT_MIB) * MIB, as_views=as_views, make_send=make_send
        )
        self._parameters: list[nn.Parameter] = []
        self._looks: tuple[Any, ...] = ()
        self._checked: set[tuple[Any, ...]] = set()
        self._sent: set[str] = set()
        self._seen = 0
        self._build()

    def __del__(self) -> None:
        self.disconnect()

    @property
    def local(self) -> bool:
        """Whether gradients were accumulated that were not averaged since."""
        return bool(self._reducer.local)

    @local.setter
    def local(self, value: bool) -> None:
        assert not value
        self._reducer.local.clear()

    @property
    def rides(self) -> bool:
        """Whether something else travels with the gradients."""
        return self._reducer.rides

    @property
    def averages(self) -> bool:
        """Whether a backward that runs now averages gradients."""
        return self._reducer.averages

    @averages.setter
    def averages(self, value: bool) -> None:
        self._reducer.averages = value

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        if not torch.compiler.is_compiling() and self._changed():
            self._build()
        if self._alone or not self._trains:
            return call(*args, **kwargs)
        self.stale_buffers = self._has_buffers
        if self._has_buffers and self.broadcast_buffers and self._reducer.averages:
            self.sync_buffers()
            self.stale_buffers = True
        return call(*args, **kwargs)

    def before_backward(self, loss: Tensor) -> None:
        """Have the backward that comes average gradients of what is trained now."""
        if self._changed():
            self._build()

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Say whether the optimizer updates any parameter of the module."""
        return any(id(p) in self._owned for group in optimizer.param_groups for p in group["params"])

    @contextmanager
    def synchronizing(self, enabled: bool) -> Iterator[None]:
        """Have backwards average gradients, or not; on leaving, what held before holds again.

        Averaging one micro-batch early changes nothing in the end: the mean over ranks is linear.
        """
        before, self.averages = self.averages, enabled
        try:
            yield
        finally:
            self.averages = before

    def sync_buffers(self) -> None:
        """Give every rank the buffers of rank 0, in one broadcast."""
        self.stale_buffers = False
        if self._group is not None:
            send_from_first(self.module.buffers(), self._group)

    def _changed(self) -> bool:
        """Say whether parameters were frozen, unfrozen, converted or replaced since the module was looked at."""
        if self._registrations.count != self._seen:  # only then: walking through the modules takes long
            self._seen = self._registrations.count
            now = list(self.module.parameters())
            if len(now) != len(self._parameters) or any(a is not b for a, b in zip(now, self._parameters, strict=True)):
                return True
        return tuple(map(_LOOK, self._parameters)) != self._looks

    def _build(self) -> None:
        if self._group is None:
            return
        self._seen = self._registrations.count
        named = dict(self.module.named_parameters())
        parameters = list(named.values())
        replaced = len(parameters) != len(self._parameters) or any(
            a is not b for a, b in zip(parameters, self._parameters, strict=True)
        )
        before = {id(parameter) for parameter in self._parameters}
        self._parameters = parameters
        self._looks = tuple(map(_LOOK, parameters))
        # Adam's and SGD's parameter lists are looked through at every step.
        self._owned = frozenset(map(id, parameters))
        self._has_buffers = any(True for _ in self.module.buffers())
        self._trains = any(parameter.requires_grad for parameter in parameters)
        if self._alone:
            return
        if replaced:
            self._checked.clear()
        if self._looks not in self._checked:  # once for each: code that freezes and unfreezes goes to and fro
            self._check(self.module)
            self._checked.add(self._looks)
        if replaced:
            self._send_new([parameter for parameter in parameters if id(parameter) not in before])
        trained = [(name, parameter) for name, parameter in named.items() if parameter.requires_grad]
        self._reducer.watch(trained, sparse_parameters(self.module) if trained else set())

    def _send_new(self, parameters: list[nn.Parameter]) -> None:
        """Make parameters equal that were not there before, and buffers of other names."""
        buffers = dict(self.module.named_buffers())
        new = [buffer for name, buffer in buffers.items() if name not in self._sent]
        self._sent.update(buffers)
        send_from_first((*parameters, *new), self._group)

    def disconnect(self) -> None:
        """Exchange nothing any more. What an exception holds would otherwise keep the other ranks waiting."""
        # An engine must not be the last to hold the process group: it would destroy it without releasing the
        # GIL, and wait for gloo's threads, which may be waiting for the GIL (seen in 1 of 20 tear-downs).
        self._group = None
        reducer = vars(self).get("_reducer")
        if reducer is not None:
            reducer.close()
