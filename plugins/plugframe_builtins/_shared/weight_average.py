"""Averages of the weights, sharded where the model is."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe import OrderError, hookimpl
from plugframe.base import Extension
from plugframe.hooks.context import Context


class _Average:
    """The average of one module: parameters and floating-point buffers, in float32 or wider."""

    def __init__(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        self.module = weakref.ref(module)
        self.optimizer: weakref.ref[Optimizer] | None = None
        self.num_steps = self.num_updates = 0
        self.tensors: dict[str, Tensor] = {}
        self.copy(state)

    def copy(self, state: dict[str, Tensor]) -> None:
        """Begin at these weights."""
        self.tensors = {
            name: value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
            for name, value in state.items()
        }


class WeightAverage(Extension):
    """Base class: a subclass gives `new_weight`.

    Args:
        name: of the extension, for messages.
        every: optimizer steps per update.
        start: optimizer steps before the first update.
    """

    def __init__(self, *, name: str, every: int, start: int) -> None:
        self.every, self.start = every, start
        self._name = name
        self._averages: list[_Average] = []
        self._swapped = False

    def new_weight(self, num_updates: int) -> float:
        """Return the weight of the weights in an update, which is the `num_updates`-th."""
        raise NotImplementedError

    @contextmanager
    def averaged(self, module: nn.Module) -> Iterator[None]:
        """Evaluate with the averages in place of the weights in a ``with`` block. Every rank must enter it."""
        average = next((each for each in self._averages if each.module() is module), None)
        if average is None or self._swapped:
            raise OrderError("averaged() takes a module that was set up and trains, and blocks do not nest.")
        if self.start and not average.num_updates:
            raise OrderError(
                f"averaged(): the extension {self._name!r} has no average yet: it starts after {self.start} optimizer "
                f"steps, and this module has made {average.num_steps}."
            )
        state = self._hooks.strategy_module_state(module=module, sharded=True)
        own = {name: value.detach().clone() for name, value in state.items() if isinstance(value, Tensor)}
        self._swapped = True
        try:
            self._hooks.strategy_load_module_state(module=module, state=dict(average.tensors), strict=False)
            yield
        finally:
            self._swapped = False
            self._hooks.strategy_load_module_state(module=module, state=own, strict=False)

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self._hooks, self._averages, self._swapped = context.hooks, [], False

    @hookimpl
    def on_setup(self, module: nn.Module) -> None:
        if any(parameter.requires_grad for parameter in module.parameters()):
            self._averages.append(_Average(module, self._state_of(module)))

    @hookimpl
    def on_backward(self, loss: Tensor) -> None:
        if self._swapped:
            raise OrderError("backward() in a block of averaged() would train the averages: leave the block before.")
        for average in self._averages:
            module = average.module()
            if module is not None and not average.num_steps:
                # Weights that were loaded since set-up.
                average.copy(self._state_of(module))

    @hookimpl
    @torch.no_grad()
    def on_optimizer_step(self, optimizer: Optimizer) -> None:
        for average in self._averages:
            module = average.module()
            if module is None or not self._drives(optimizer, average, module):
                continue
            average.num_steps += 1
            if average.num_steps <= self.start or (average.num_steps - self.start) % self.every:
                continue
            average.num_updates += 1
            new_weight = self.new_weight(average.num_updates)
            for name, value in self._state_of(module).items():
                old = average.tensors[name]
                old.lerp_(value.detach().to(old.dtype), new_weight)

    def _drives(self, optimizer: Optimizer, average: _Average, module: nn.Module) -> bool:
        """Return whether the optimizer is the first one that stepped on the module: others do not count."""
        if average.optimizer is None or average.optimizer() is None:
            own = set(map(id, module.parameters()))
            if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
                average.optimizer = weakref.ref(optimizer)
        return average.optimizer is not None and average.optimizer() is optimizer

    def _state_of(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the floating-point tensors of a module: complete, or this rank's shards, as the strategy has them."""
        state = self._hooks.strategy_module_state(module=module, sharded=True)
        return {n: value for n, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()}

    @hookimpl
    def extension_state(self) -> dict[str, Any]:
        alive = [each for each in self._averages if each.module() is not None]
        return {"averages": [{"steps": a.num_steps, "updates": a.num_updates, "tensors": a.tensors} for a in alive]}

    @hookimpl
    def extension_load_state(self, state: dict[str, Any]) -> None:
        alive = [each for each in self._averages if each.module() is not None]
        if len(state["averages"]) != len(alive):
            raise ValueError(f"averages of {len(state['averages'])} modules, and {len(alive)} were set up")
        for average, saved in zip(alive, state["averages"], strict=True):
            shapes = [{n: tuple(v.shape) for n, v in t.items()} for t in (saved["tensors"], average.tensors)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"names or shapes of the averages differ: {shapes[0]}, here {shapes[1]}")
            average.num_steps, average.num_updates = saved["steps"], saved["updates"]
            for name, value in saved["tensors"].items():
                average.tensors[name].copy_(value)
