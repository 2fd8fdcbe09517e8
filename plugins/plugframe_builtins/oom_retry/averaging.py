"""Average locally accumulated gradients over ranks in one exchange that allocates nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.errors import UnsupportedError
from plugframe.hooks.context import Context


class _Zero(torch.autograd.Function):
    """A loss of 0 that depends on all parameters; its gradients have the parameters' shapes and no storage."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return parameters[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return tuple(parameter.new_zeros(()).expand_as(parameter) for parameter in ctx.parameters)


def _weak(engine: Any) -> Any:
    return (lambda: None) if engine is None else weakref.ref(engine)


class Unit:
    """A module that was set up, with its engine.

    Attributes:
        number: of its set-up, equal on all ranks.
        module: kept alive until the next set-up: all ranks must iterate over the same modules, and an unused one
            may otherwise survive on some ranks only, in the traceback of an error raised there.
    """

    def __init__(self, number: int, module: nn.Module, engine: Any) -> None:
        self.number = number
        self.module = module
        self._engine = engine
        self._known: list[tuple[nn.Parameter, torch.dtype]] | None = None

    def weakly(self) -> tuple[int, weakref.ref[nn.Module], Any]:
        """Return number, module and engine, the latter two as weak references."""
        return self.number, weakref.ref(self.module), _weak(self._engine)

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def changed(self) -> bool:
        """Return whether the set of trainable parameters changed since the last call."""
        known, self._known = self._known, [(p, p.dtype) for p in self.parameters()]
        if known is None or len(known) != len(self._known):
            return True
        return any(p is not q or a is not b for (p, a), (q, b) in zip(known, self._known, strict=True))

    def zero(self) -> list[Tensor]:
        """Return a loss of 0, computed under the strategy like a forward; empty without trainable parameters."""
        parameters, engine = self.parameters(), self._engine
        zero: Any = _Zero.apply
        if not parameters:
            return []
        return [zero(*parameters) if engine is None else engine(zero, *parameters)]

    def synchronizing(self, context: Context, *, enabled: bool) -> Any:
        """Return the strategy's context that enables or disables gradient averaging."""
        hook = context.hooks.strategy_no_sync
        return hook(module=self.module, engine=self._engine, enabled=not enabled)


class Units:
    """The modules of a session that still exist."""

    def __init__(self) -> None:
        self._units: list[Unit] = []
        self._count = 0

    def add(self, context: Context, module: nn.Module, engine: Any) -> None:
        """Add a module that was set up, and agree on the others still in use; all ranks must call it."""
        earlier = [unit.weakly() for unit in self._units]
        self._units = []
        gc.collect()
        living = {number: (found, old) for number, ref, old in earlier if (found := ref()) not in (None, module)}
        on_all = set(living).intersection(*context.hooks.collective_all_gather_object(obj=set(living), group=None))
        self._units = [
            Unit(number, found, old()) for number, (found, old) in sorted(living.items()) if number in on_all
        ]
        self._units.append(Unit(self._count, module, engine))
        self._count += 1

    def clear(self) -> None:
        """Remove all modules."""
        self._units.clear()

    def modules(self) -> list[nn.Module]:
        """Return the modules in order of set-up."""
        return [unit.module for unit in self._units]

    def parameters(self) -> list[nn.Parameter]:
        """Return their trainable parameters, each once, in the same order on all ranks."""
        return list({id(p): p for unit in self._units for p in unit.parameters()}.values())

    def prepare(self, context: Context) -> None:
        """Run the strategy's pending communication now, rather than in a forward that some ranks may not reach.

        A strategy may allocate, connect ranks or compare models in its first exchange and after parameters changed, and
        apply the result, or broadcast buffers, in the forward after an exchange.
        """
        changed = [unit for unit in self._units if unit.changed()]
        for module in [unit.module for unit in changed]:
            if any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
                raise UnsupportedError(
                    f"{type(module).__name__} normalises over the batches of all ranks (SyncBatchNorm): a rank whose "
                    "memory runs out alone would leave the others waiting. Leave sync_batchnorm out, or oom-retry."
                )
        trained = [unit for unit in self._units if unit.parameters()]
        # A backward prepares all modules for an exchange, and one that it does not reach would catch up in its next,
        # which must be local: with several modules, that is done now.
        if changed or len(trained) > 1:
            self._exchange_nothing(context, trained if len(trained) > 1 else changed)
        with self.apart(context):
            for unit in self._units:
                unit.zero()

    def _exchange_nothing(self, context: Context, units: Sequence[Unit]) -> None:
        kept = [(parameter, parameter.grad) for unit in units for parameter in unit.parameters()]
        for parameter, _ in kept:
            parameter.grad = None
        with ExitStack() as stack:
            for unit in units:
                stack.enter_context(unit.synchronizing(context, enabled=True))
            self._exchange(context, units)
        for parameter, gradient in kept:
            parameter.grad = gradient

    @contextmanager
    def apart(self, context: Context) -> Iterator[None]:
        """Accumulate gradients locally."""
        with ExitStack() as stack:
            for unit in self._units:
                stack.enter_context(unit.synchronizing(context, enabled=False))
            yield

    def average(self, context: Context, used: set[int]) -> None:
        """Average the accumulated gradients of every module with a parameter used on any rank.

        Within the caller's `no_backward_sync` they stay local, as in any backward.
        """
        self._exchange(context, [u for u in self._units if any(id(p) in used for p in u.parameters())])

    def _exchange(self, context: Context, units: Sequence[Unit]) -> None:
        # One backward for all, so that each engine takes part once.
        losses = [loss for unit in units for loss in unit.zero()]
        if losses:
            module = units[0].module if len(units) == 1 else None
            loss = torch.stack(losses).sum()
            context.hooks.strategy_backward(loss=loss, module=module, args=(), kwargs={})
            context.hooks.precision_finish_backward()
