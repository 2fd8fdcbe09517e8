"""Strategies that break one law each."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.base import Strategy
from plugframe.hooks import Engine, hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins.ddp.strategy import DDP


class Right(DDP):
    """Breaks none."""


class Alone(Right):
    """Lets every rank go its own way (law 6)."""

    @hookimpl
    def strategy_setup_module(self, module: nn.Module) -> Any:
        super().strategy_setup_module(module)
        return None


class Halves(Right):
    """Gives half the norm of the gradients (law 7)."""

    @hookimpl
    def strategy_clip_gradients(
        self,
        module: nn.Module,
        parameters: Sequence[Tensor],
        clip_value: float | None,
        max_norm: float | None,
        norm_type: float,
        error_if_nonfinite: bool,
    ) -> Tensor | None:
        norm = super().strategy_clip_gradients(module, parameters, clip_value, max_norm, norm_type, error_if_nonfinite)
        return None if norm is None else norm / 2


class Finite(Right):
    """Clips non-finite gradients without an error (law 7)."""

    @hookimpl
    def strategy_clip_gradients(
        self,
        module: nn.Module,
        parameters: Sequence[Tensor],
        clip_value: float | None,
        max_norm: float | None,
        norm_type: float,
        error_if_nonfinite: bool,
    ) -> Tensor | None:
        return super().strategy_clip_gradients(module, parameters, clip_value, max_norm, norm_type, False)


class Repeats(Right):
    """Gives the last batch of an evaluation twice (law 8)."""

    last: Any = None

    @hookimpl
    def strategy_next_batch(self, iterator: Any, exhausted: Any) -> Any:
        batch = super().strategy_next_batch(iterator, exhausted)
        if torch.is_grad_enabled():
            return batch
        last, self.last = self.last, None if batch is exhausted else batch
        return last if batch is exhausted and last is not None else batch


class Leaves(Right):
    """Sets a variable and leaves it (law 9)."""

    @hookimpl
    def strategy_setup(self, context: Context) -> None:
        super().strategy_setup(context)
        # Another value each time: a suite that looks after a first job would not see one that stays.
        os.environ["WRONG_STRATEGY"] = str(int(os.environ.get("WRONG_STRATEGY", "0")) + 1)


class Drifts(Right):
    """Lets every rank keep its own running statistics."""

    def __init__(self) -> None:
        super().__init__(broadcast_buffers=False)


class Restarts(Right):
    """Begins every optimizer anew (law 4)."""

    @hookimpl
    def strategy_load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        pass


class Unequal(Right):
    """Begins on every rank with the weights that it has."""

    @hookimpl
    def strategy_setup_module(self, module: nn.Module) -> Engine:
        return Strategy.strategy_setup_module(self, module)


class Prefixes(Right):
    """Saves the weights under the keys of a wrapper."""

    @hookimpl
    def strategy_module_state(self, module: nn.Module, sharded: bool) -> dict[str, Any]:
        state = super().strategy_module_state(module, sharded)
        return {f"module.{name}": tensor for name, tensor in state.items()}


class Adds(Right):
    """Leaves a buffer of its own in the user's model."""

    @hookimpl
    def strategy_setup_module(self, module: nn.Module) -> Engine:
        engine = super().strategy_setup_module(module)
        self._undo.callback(module.register_buffer, "averaged", torch.ones(1))
        return engine


class Again(Right):
    """Goes through its own hook a second time."""

    inside = False

    @hookimpl
    def strategy_module_state(self, module: nn.Module, sharded: bool) -> dict[str, Any]:
        if self.inside:
            return super().strategy_module_state(module, sharded)
        self.inside = True
        try:
            state: dict[str, Any] = self.context.hooks.strategy_module_state(module=module, sharded=sharded)
        finally:
            self.inside = False
        return state


class Remembers(Right):
    """Reads other data in its second job."""

    jobs = 0

    @hookimpl
    def strategy_setup(self, context: Context) -> None:
        super().strategy_setup(context)
        self.jobs += 1

    @hookimpl
    def strategy_data_shard(self) -> tuple[int, int]:
        rank, size = super().strategy_data_shard()
        return (rank + self.jobs) % size, size


class Loses(Right):
    """Loses what was accumulated without an exchange."""

    @hookimpl
    def strategy_no_sync(self, module: nn.Module, engine: Engine, enabled: bool) -> AbstractContextManager[Any]:
        return self._losing(module, super().strategy_no_sync(module, engine, enabled))

    @contextmanager
    def _losing(self, module: nn.Module, context: AbstractContextManager[Any]) -> Iterator[None]:
        with context:
            yield
        module.zero_grad()


class Talks(Right):
    """Describes itself in one text, which is taken for lines of a letter each."""

    @hookimpl
    def strategy_describe(self) -> str:  # type: ignore[override]
        return "gradients are averaged"


class Curt(Right):
    """Drops what a script gives to backward besides the loss."""

    @hookimpl
    def strategy_backward(self, loss: Tensor, module: nn.Module | None) -> None:  # type: ignore[override]
        super().strategy_backward(loss, module, (), {})


class Ignores(Right):
    """Takes any option, and does nothing about it (law 10)."""

    def __init__(self, **options: Any) -> None:
        super().__init__()


class Common(Right):
    """Notes in one list what all of its objects see."""

    seen: list[Any] = []  # noqa: RUF012

    @hookimpl
    def strategy_setup_module(self, module: nn.Module) -> Any:
        self.seen.append(type(module).__name__)
        return super().strategy_setup_module(module)


class Misnamed(Right):
    """Declares an option that its constructor does not take."""


class Mute(Right):
    """Has no word in its descriptor about what it is."""


class Raises(Right):
    """Cannot be constructed without an argument."""

    def __init__(self) -> None:
        raise KeyError("how many")


class Unsent(Right):
    """Holds what no other process can be sent before it is set up."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Unmarked(Strategy):
    """Overrides a hook without marking it."""

    def strategy_data_shard(self) -> tuple[int, int]:
        return 0, 1


class Renamed(Strategy):
    """Calls an argument by another name than the hook."""

    @hookimpl
    def strategy_setup_module(self, model: nn.Module) -> Any:
        return None


class Lacks:
    """Has one hook of its kind, and none of the others."""

    @hookimpl
    def strategy_data_shard(self) -> tuple[int, int]:
        return 0, 1


class Insists(Right):
    """Makes a step of its own, whatever step it is given, and does not skip it."""

    @hookimpl
    @torch.no_grad()
    def strategy_optimizer_step(self, optimizer: Optimizer, step: Any, closure: Any) -> Any:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])
