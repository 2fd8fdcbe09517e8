"""Plugins with state in checkpoints, at the top level of a module so that ranks import them by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from plugframe import Plugin, hookimpl
from plugframe.base import Extension, Logger, Strategy
from plugframe.hooks import Axis


class Average(Extension):
    """Holds a copy of every parameter: sharded where the model is."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor
        self.values: dict[str, Any] = {}
        self.num_updates = 0
        self.refuses = False

    @hookimpl
    def on_setup(self, module: nn.Module) -> None:
        self.values = {name: parameter.detach() * self.factor for name, parameter in module.named_parameters()}

    @hookimpl
    def extension_state(self) -> dict[str, Any]:
        return {"values": self.values, "num_updates": self.num_updates, "kinds": ["a", ("b", 1.5, None)]}

    @hookimpl
    def extension_load_state(self, state: dict[str, Any]) -> None:
        if self.refuses:
            raise ValueError("out of paper")
        if state["kinds"] != ["a", ("b", 1.5, None)]:
            raise ValueError(f"{state['kinds']}")
        self.num_updates = state["num_updates"]
        for name, value in state["values"].items():
            self.values[name].copy_(value)


class Counter(Extension):
    """Counts backwards, and each rank by itself."""

    def __init__(self) -> None:
        self.num_backwards = self.mine = 0
        self.fails_on: int | None = None
        self.context: Any = None

    @hookimpl
    def on_launch(self, context: Any) -> None:
        self.context = context
        self.mine = 10 * context.world.global_rank

    @hookimpl
    def on_backward(self) -> None:
        self.num_backwards += 1

    @hookimpl
    def extension_state(self) -> dict[str, Any]:
        ranks = self.context.hooks.collective_all_gather_object(obj=self.mine, group=None)
        if self.fails_on == self.context.world.global_rank:
            raise OSError("no state today")
        return {"num_backwards": self.num_backwards, "ranks": ranks}

    @hookimpl
    def extension_load_state(self, state: dict[str, Any]) -> None:
        self.num_backwards = state["num_backwards"]
        self.mine = state["ranks"][min(self.context.world.global_rank, len(state["ranks"]) - 1)]


class Named(Logger):
    """A logger with a run id."""

    run_id = ""

    @hookimpl
    def logger_log(self, metrics: Any, step: int | None) -> None:
        pass

    @hookimpl
    def logger_state(self) -> dict[str, Any]:
        return {"run_id": self.run_id}

    @hookimpl
    def logger_load_state(self, state: dict[str, Any]) -> None:
        self.run_id = state["run_id"]


class Rounds(Strategy):
    """A strategy that counts its steps."""

    num_steps = 0

    @hookimpl
    def strategy_optimizer_step(self, optimizer: Any, step: Any, closure: Any) -> Any:
        self.num_steps += 1
        return super().strategy_optimizer_step(optimizer, step, closure)

    @hookimpl
    def strategy_state(self) -> dict[str, Any]:
        return {"num_steps": torch.tensor(self.num_steps)}

    @hookimpl
    def strategy_load_state(self, state: dict[str, Any]) -> None:
        self.num_steps = int(state["num_steps"])


class Beside(Rounds):
    """A strategy beside the one that divides the batch."""

    plugin = Plugin(factory=f"{__name__}:Beside", divides="blocks", axes=(Axis("twin"),))

    @hookimpl
    def strategy_parallelize(self, module: nn.Module) -> None:
        self.num_steps += 1
