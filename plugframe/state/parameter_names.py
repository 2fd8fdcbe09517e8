"""Parameters by name in the state of an optimizer, where torch has numbers.

A number says where a parameter stands among those of its optimizer, which another run may order in another way;
its name says which it is. ``Optimizer.load_state_dict`` takes either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from plugframe.adopt.module import COMPILED
from plugframe.state.key_matching import match

#: The names of an optimizer's parameters, group by group.
Names = list[list[str]]

#: Gives the names of an optimizer's parameters; None where some have none, or two have the same.
Naming = Callable[[Optimizer], Names | None]


def names_of(optimizer: Optimizer, modules: Iterable[nn.Module]) -> Names | None:
    """Return the names of the optimizer's parameters in these modules, or None."""
    known: dict[int, str] = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            known.setdefault(id(parameter), name.replace(COMPILED, ""))
    names = [[known.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]
    flat = [name for group in names for name in group]
    return names if all(flat) and len(set(flat)) == len(flat) else None


def to_names(state: Mapping[str, Any], names: Names | None) -> dict[str, Any]:
    """Return an optimizer's state with names in place of numbers; unchanged if the names are not those of all."""
    groups = state["param_groups"]
    if names is None or [len(group["params"]) for group in groups] != [len(group) for group in names]:
        return dict(state)
    numbers = [number for group in groups for number in group["params"]]
    called = dict(zip(numbers, (name for group in names for name in group), strict=True))
    return {
        **state,
        "state": {called.get(number, number): kept for number, kept in state["state"].items()},
        "param_groups": [{**group, "params": own} for group, own in zip(groups, names, strict=True)],
    }


def renamed(state: Mapping[str, Any], names: Names | None) -> Mapping[str, Any]:
    """Return a saved state with an optimizer's own names where the saved ones differ only by wrappers."""
    saved = [list(group["params"]) for group in state["param_groups"]]
    if names is None or not _named(saved):
        return state
    found = match((name for group in names for name in group), (name for group in saved for name in group))
    own = {theirs: mine for mine, theirs in found.items() if mine != theirs}
    if not own:
        return state
    return {
        **state,
        "state": {own.get(name, name): kept for name, kept in state["state"].items()},
        "param_groups": [
            {**group, "params": [own.get(name, name) for name in params]}
            for group, params in zip(state["param_groups"], saved, strict=True)
        ],
    }


def differences(state: Mapping[str, Any], names: Names | None) -> list[str]:
    """Return what an optimizer with these names and a saved state do not have in common, in words."""
    saved = [list(group["params"]) for group in state["param_groups"]]
    own = names if names is not None and _named(saved) else None
    if own is None or len(own) != len(saved):
        return []
    found = []
    for number, (mine, theirs) in enumerate(zip(own, saved, strict=True)):
        missing = [name for name in mine if name not in theirs]
        unexpected = [name for name in theirs if name not in mine]
        found += [f"missing in parameter group {number}: {', '.join(missing)}"] if missing else []
        found += [f"unexpected in parameter group {number}: {', '.join(unexpected)}"] if unexpected else []
    return found


def to_numbers(state: Mapping[str, Any], names: Names | None) -> dict[str, Any]:
    """Return a saved state with the numbers the optimizer with these names gives its parameters, in its order."""
    saved = [list(group["params"]) for group in state["param_groups"]]
    order = names if names is not None and _named(saved) and not differences(state, names) else saved
    number = {name: position for position, name in enumerate(name for group in order for name in group)}
    return {
        **state,
        "state": {number.get(name, name): kept for name, kept in state["state"].items()},
        "param_groups": [
            {**group, "params": [number[name] for name in own]}
            for group, own in zip(state["param_groups"], order, strict=True)
        ],
    }


def _named(groups: list[list[Any]]) -> bool:
    return all(isinstance(name, str) for group in groups for name in group)
