"""What FSDP keeps beside a module: ``fully_shard`` over a shim, so that the module's own class stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from plugframe.base import ForwardShim, map_tensors, persistent_buffers, sync_buffers
from plugframe.errors import OrderError, UsageError
from plugframe_builtins.sharding.company import Company


class Shim(ForwardShim):
    """Runs a call, and shows torch every tensor that comes out of it, in whatever it comes.

    torch looks for tensors in tuples, lists and dicts; of another object it would not see that its backward begins.
    """

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tensors: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            tensors.append(_no_view(tensor))
            return tensors[-1]

        result = map_tensors(note, super().forward(call, *args, **kwargs))
        return tensors, _Sealed(result)


class _Sealed:
    def __init__(self, content: Any) -> None:
        self.content = content


def show_outputs(unit: nn.Module) -> None:
    """Have a unit's outputs be no views, before it is sharded: torch attaches to them what begins their backward."""
    unit.register_forward_hook(lambda unit, args, output: map_tensors(_no_view, output))


def _no_view(tensor: Tensor) -> Tensor:
    # Changed in place, a view would lose what is attached to it.
    if not (tensor.requires_grad and tensor._is_view()):
        return tensor
    own: Tensor = _NoView.apply(tensor)  # type: ignore[no-untyped-call]
    return own


class _NoView(torch.autograd.Function):
    """The same memory as a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Engine:
    """``engine(call, *args)`` runs ``call(*args)`` on gathered parameters, so that backward averages gradients.

    Args:
        shim: over the module, sharded.
        units: the sharded blocks, in the order of the model.
        company: of the ranks that evaluate.

    Attributes:
        local: whether gradients were accumulated that were not averaged since.
        stale_buffers: whether a forward may have changed the buffers since they were equal.
    """

    def __init__(self, shim: Shim, units: Sequence[nn.Module], company: Company) -> None:
        self.shim = shim
        self.local = self.stale_buffers = False
        self._sharded: Any = shim  # an FSDPModule too
        self._units = tuple(units)
        self._has_buffers = bool(persistent_buffers(shim.module))
        self._company = company
        self._number = company.join(self)
        self._averages = True
        self._inside = self._closed = False
        # In the order in which the last forward came to them.
        self._visited: list[nn.Module] = []
        self._watch()

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        evaluates = not (torch.is_grad_enabled() and self.shim.module.training)
        if evaluates:
            self._company.announce(self._number)
        else:
            self.stale_buffers = self._has_buffers
        self._visited.clear()
        self._inside = True
        try:
            _, sealed = self.shim(call, *args, **kwargs)
        except BaseException:
            self.reset()
            raise
        finally:
            self._inside = False
        if evaluates:
            # With gradients too: a rank that only helped has its part alone again, and all must gather next time.
            self.reshard()
        return sealed.content

    def sync_buffers(self, hooks: Any) -> None:
        """Give every rank rank 0's buffers, so that all ranks evaluate one model. Every rank must call it."""
        sync_buffers(self.shim.module, hooks)
        self.stale_buffers = False

    def reset(self) -> None:
        """Forget a forward that failed, so that the next one can run."""
        # From torch 2.13 on; before, a forward after a failed one fails as well.
        reset = getattr(self._sharded, "reset_iter_state", None)
        if reset is not None:
            reset()

    def forget(self) -> None:
        """Drop gradients that were accumulated and not averaged. Every rank must call it: it gathers."""
        self.local = False
        for part in self.shim.modules():
            if isinstance(part, FSDPModule):
                part.unshard()
                for parameter in part.parameters():  # those of units within are gathered in their turn
                    parameter.grad = None if not isinstance(parameter, DTensor) else parameter.grad
                part.reshard()

    def close(self) -> None:
        """Have the module say that it ran in a job which has ended."""
        self._closed = True

    def reshard(self) -> None:
        """Free the parameters that are gathered; then those of the module are ``DTensor``, this rank's part."""
        for part in self.shim.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Say whether the optimizer updates any parameter of the module."""
        own = {id(parameter) for parameter in self.shim.module.parameters()}
        return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Surround a backward: parts of the module may run again in it, and it averages gradients or does not."""
        before, self._inside = self._inside, True
        try:
            yield
            self.local = not self._averages
        finally:
            self._inside = before

    @contextmanager
    def synchronizing(self, enabled: bool) -> Iterator[None]:
        """Have backwards average gradients, or not; on leaving, what held before holds again."""
        before = self._averages
        self._set(enabled)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, averages: bool) -> None:
        self._averages = averages
        self._sharded.set_requires_gradient_sync(averages)

    def _watch(self) -> None:
        """Have the units, and parts with parameters outside of them, say when they run."""
        # Before torch's own hooks, which would take a unit that runs by itself for a model of its own.
        for unit in self._units:
            unit.register_forward_pre_hook(self._visit, prepend=True)
        within = {id(part) for unit in self._units for part in unit.modules()}
        for part in self.shim.module.modules():
            if id(part) not in within and next(part.parameters(recurse=False), None) is not None:
                part.register_forward_pre_hook(self._check_inside, prepend=True)

    def _visit(self, unit: nn.Module, _: Any) -> None:
        self._check_inside(unit, _)
        self._visited.append(unit)

    def _check_inside(self, part: nn.Module, _: Any) -> None:
        if self._inside:
            return
        module = self.shim.module
        if self._closed:
            raise OrderError(
                f"This {type(module).__name__} was sharded over the ranks of a job that was torn down: save it before, "
                "and load it into a new one."
            )
        name = next((path for path, each in module.named_modules() if each is part), "")
        raise UsageError(
            f"{type(part).__name__} {name!r} was called by itself, and its parameters are gathered only while the "
            f"whole {type(module).__name__} runs: call it inside a method of the model, and mark that method with "
            "lite.setup(..., forward_methods=(...))."
        )

    @torch.no_grad()
    def help(self) -> None:
        """Gather what another rank's forward gathers, and free it."""
        self._sharded.unshard()
        self._visited = self._visited or list(self._units)
        for unit in self._visited:
            unit.unshard()  # type: ignore[operator]
            unit.reshard()  # type: ignore[operator]
        self.reshard()

    def order(self) -> list[int]:
        """Return in which order the last forward came to the units."""
        number = {id(unit): position for position, unit in enumerate(self._units)}
        return [number[id(unit)] for unit in self._visited]
