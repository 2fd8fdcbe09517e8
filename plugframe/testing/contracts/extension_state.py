"""Rules of extensions with state in checkpoints: what was saved comes back, on one rank and on two."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plugframe.core.registry.registry import Registry
from plugframe.hooks.markers import marks_of
from plugframe.hooks.world import World
from plugframe.testing.contracts import states
from plugframe.testing.contracts.base import PluginContract
from plugframe.testing.contracts.running import broken, one_line, running
from plugframe.testing.ranks import RanksFailed, run_ranks
from plugframe.utils.shards import local_of
from plugframe.utils.tree import map_tensors

STATE = (
    "State (a new object gets back from a checkpoint what extension_state() returned, whatever it has counted since)"
)
EQUAL = "Equal (the tensors of extension_state() are equal on all ranks: any rank may write them)"


class ExtensionStateContract(PluginContract):
    """The part of the suite of extensions about their state."""

    def test_its_state_comes_back_from_a_checkpoint(self) -> None:
        """A new object that has a state of its own loads that of a run, twice; a fresh one likewise."""
        if not has_state(self.make()):
            pytest.skip("It has no extension_state().")
        problem = saved_and_loaded(self.make)
        if problem:
            broken(STATE, problem)

    def test_on_ranks_its_state_comes_back(self) -> None:
        """The same on two ranks, whose tensors are equal."""
        if not has_state(self.make()):
            pytest.skip("It has no extension_state().")
        if self.descriptor.ranks == "one":
            pytest.skip("It works with one rank only.")
        try:
            found = run_ranks(2, _on_ranks, self.spec, dict(self.options), os.getcwd())
        except RanksFailed as error:
            broken(STATE, f"on two ranks: {error}")
        for rule, problem in found:
            if problem:
                broken(rule, f"on two ranks: {problem}")


def has_state(plugin: Any) -> bool:
    """Return whether an extension has state in checkpoints."""
    return marks_of(plugin, "extension_state") is not None


def distinguish(plugins: list[Any]) -> None:
    """Give objects of one class keys of their own for their state."""
    for number, plugin in enumerate(plugins):
        if has_state(plugin):
            with suppress(AttributeError):  # a class that derives its key from its options
                plugin.state_key = f"number {number}"


def saved_and_loaded(make: Callable[[], Any], *, alone: bool = True) -> str:
    """Save the state of one object and load it into others; describe what differs, empty if nothing does."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path, saved = _saved(make(), folder, alone=alone)
            for num_steps, when in ((0, "a new object"), (3, "a new object that has counted three steps")):
                differs = _loaded(make(), path, saved, num_steps, alone=alone)
                if differs:
                    return f"{when}, after lite.load(): {differs}"
        except Exception as error:  # noqa: BLE001 - reported as it is
            return f"a run that saves and loads it raised {one_line(error)}"
    return ""


def _saved(plugin: Any, folder: str, *, alone: bool) -> tuple[str, Any]:
    with running(alone=alone, plugins=(plugin,)) as (lite, _):
        step = _steps(lite)
        for _ in range(2):
            step()
        path = lite.broadcast(os.path.join(folder, "checkpoint"))
        lite.save(path, {})
        saved = _copied(plugin.extension_state())
        lite.barrier()
    return path, saved


def _loaded(plugin: Any, path: str, saved: Any, num_steps: int, *, alone: bool) -> str:
    """Return how the object's state differs from `saved` after loading, and after loading once more."""
    with running(alone=alone, plugins=(plugin,)) as (lite, _):
        step = _steps(lite)
        differs = ""
        for _ in range(2):
            for _ in range(num_steps):
                step()
            lite.load(path, {})
            differs = differs or states.difference(saved, _copied(plugin.extension_state()))
        lite.barrier()
    return differs


def _steps(lite: Any) -> Callable[[], None]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def step() -> None:
        optimizer.zero_grad()
        lite.backward(model(torch.linspace(-1, 1, 8).reshape(2, 4)).pow(2).mean())
        optimizer.step()

    return step


def _copied(state: Any) -> Any:
    return copy.deepcopy(map_tensors(lambda tensor: local_of(tensor).detach().cpu().clone(), state))


def _on_ranks(world: World, spec: str, options: dict[str, Any], folder: str) -> tuple[str, str]:
    """Return the rule that is broken, and how. Every rank must call it."""
    os.chdir(folder)
    registry = Registry.discover()
    entry = registry.find("extension", spec)
    made = registry.make(entry, options)
    with running(alone=False, plugins=(made,)) as (lite, context):
        step = _steps(lite)
        step()
        plain = made.extension_state()
        flat: dict[str, Tensor] = {}
        _flatten(plain, "state", flat)
        everyone = context.hooks.collective_all_gather_object(
            obj={name: states.bits(tensor) for name, tensor in flat.items()}, group=None
        )
        lite.barrier()
    for name, value in everyone[0].items():
        if any(other.get(name) != value for other in everyone):
            return EQUAL, f"{name} differs between ranks: gather it, as in extension_state()'s docstring"
    return STATE, saved_and_loaded(lambda: registry.make(entry, options), alone=False)


def _flatten(value: Any, where: str, found: dict[str, Tensor]) -> None:
    """Collect the tensors that are not sharded, by their place."""
    if isinstance(value, Tensor):
        if local_of(value) is value:
            found[where] = value
    elif isinstance(value, dict):
        for key, item in value.items():
            _flatten(item, f"{where}[{key!r}]", found)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _flatten(item, f"{where}[{number}]", found)
