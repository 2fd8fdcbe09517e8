"""The DDP engine of a module: gradient averaging and buffer broadcasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from plugframe.utils.buffers import replicated_buffers
from plugframe.utils.registrations import Registrations
from plugframe_builtins._shared.broadcast import broadcast_from_first
from plugframe_builtins._shared.data_parallel.buckets import DEFAULT_MIB, MIB, Send
from plugframe_builtins._shared.data_parallel.reducer import Backward, Reducer
from plugframe_builtins._shared.data_parallel.sparse import sparse_parameters

_LOOK = attrgetter("requires_grad", "dtype")


class Engine:
    """Run ``call(*args)`` as ``engine(call, *args)``; any backward averages the gradients.

    A forward without gradients never communicates: ranks may evaluate different
    numbers of batches, or a single rank may evaluate.

    Args:
        group: the process group.
        check: raises on all ranks if their models differ.
        registrations: counts changes to any module.
        backward: shared by the engines of a session.
        bucket_cap_mb: size of a bucket in MiB.
        as_views: whether gradients are views of the buckets.
        make_send: makes a function that sends a bucket in compressed form.

    Attributes:
        broadcast_buffers: whether to broadcast buffers before each forward.
        stale_buffers: whether a forward may have changed buffers since the last broadcast.
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
        """Whether accumulated gradients are not averaged yet."""
        return bool(self._reducer.local)

    @local.setter
    def local(self, value: bool) -> None:
        assert not value
        self._reducer.local.clear()

    @property
    def checks_settings(self) -> bool:
        """Whether a check of optimizer settings travels with the gradients."""
        return self._reducer.checks_settings

    @property
    def averages(self) -> bool:
        """Whether the running backward averages gradients."""
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

    def before_backward(self) -> None:
        """Prepare averaging the gradients of trainable parameters in the coming backward."""
        if self._changed():
            self._build()

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the optimizer updates any parameter of the module."""
        return any(id(p) in self._owned for group in optimizer.param_groups for p in group["params"])

    @contextmanager
    def synchronizing(self, enabled: bool) -> Iterator[None]:
        """Enable or disable averaging in backwards; restore the previous setting on exit.

        Averaging one micro-batch early does not change the result: the mean over ranks is linear.
        """
        before, self.averages = self.averages, enabled
        try:
            yield
        finally:
            self.averages = before

    def sync_buffers(self) -> None:
        """Broadcast rank 0's buffers in one call."""
        self.stale_buffers = False
        if self._group is not None:
            broadcast_from_first(replicated_buffers(self.module), self._group)

    def _changed(self) -> bool:
        """Return whether parameters were frozen, unfrozen, converted or replaced since the last check."""
        if self._registrations.count != self._seen:  # only then: walking the modules is slow
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
        # Cached: optimizers' parameter lists are checked at every step.
        self._owned = frozenset(map(id, parameters))
        self._has_buffers = bool(replicated_buffers(self.module))
        self._trains = any(parameter.requires_grad for parameter in parameters)
        if self._alone:
            return
        if replaced:
            self._checked.clear()
        if self._looks not in self._checked:  # once per set: scripts may freeze and unfreeze repeatedly
            self._check(self.module)
            self._checked.add(self._looks)
        if replaced:
            self._send_new([parameter for parameter in parameters if id(parameter) not in before])
        trained = [(name, parameter) for name, parameter in named.items() if parameter.requires_grad]
        self._reducer.watch(trained, sparse_parameters(self.module) if trained else set())

    def _send_new(self, parameters: list[nn.Parameter]) -> None:
        """Broadcast parameters that are new since the last check, and buffers of new names."""
        buffers = dict(self.module.named_buffers())
        new = [buffer for name, buffer in buffers.items() if name not in self._sent]
        self._sent.update(buffers)
        broadcast_from_first((*parameters, *new), self._group)

    def disconnect(self) -> None:
        """Stop communicating. An engine referenced by an exception would otherwise keep the other ranks waiting."""
        # The engine must not hold the last reference to the process group: its destructor does not release the
        # GIL, and waits for gloo's threads, which may be waiting for the GIL (seen in 1 of 20 tear-downs).
        self._group = None
        reducer = vars(self).get("_reducer")
        if reducer is not None:
            reducer.close()
