"""Convert the keys of an optimizer's state between parameter numbers, as in torch, and names.

A number is a parameter's position in its optimizer, which may differ in another run; a name identifies it.
``Optimizer.load_state_dict`` accepts either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from plugframe.adopt.module import COMPILED
from plugframe.state.key_matching import match

#: The names of an optimizer's parameters, group by group.
ParameterNames = list[list[str]]

#: Returns the names of an optimizer's parameters; None if some have no name, or two have the same.
ParameterNamer = Callable[[Optimizer], ParameterNames | None]


def names_of(optimizer: Optimizer, modules: Iterable[nn.Module]) -> ParameterNames | None:
    """Return the names of the optimizer's parameters in these modules; None if some have no name."""
    known: dict[int, str] = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            known.setdefault(id(parameter), name.replace(COMPILED, ""))
    names = [[known.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]
    flat = [name for group in names for name in group]
    return names if all(flat) and len(set(flat)) == len(flat) else None


def to_names(state: Mapping[str, Any], names: ParameterNames | None) -> dict[str, Any]:
    """Return an optimizer's state with names in place of numbers; unchanged if `names` does not cover all."""
    groups = state["param_groups"]
    if names is None or [len(group["params"]) for group in groups] != [len(group) for group in names]:
        return dict(state)
    numbers = [number for group in groups for number in group["params"]]
    name_of = dict(zip(numbers, (name for group in names for name in group), strict=True))
    return {
        **state,
        "state": {name_of.get(number, number): entry for number, entry in state["state"].items()},
        "param_groups": [{**group, "params": own} for group, own in zip(groups, names, strict=True)],
    }


def renamed(state: Mapping[str, Any], names: ParameterNames | None) -> Mapping[str, Any]:
    """Return a saved state with the optimizer's own names where saved ones differ only by wrappers."""
    saved = [list(group["params"]) for group in state["param_groups"]]
    if names is None or not _named(saved):
        return state
    found = match((name for group in names for name in group), (name for group in saved for name in group))
    own = {theirs: mine for mine, theirs in found.items() if mine != theirs}
    if not own:
        return state
    return {
        **state,
        "state": {own.get(name, name): entry for name, entry in state["state"].items()},
        "param_groups": [
            {**group, "params": [own.get(name, name) for name in params]}
            for group, params in zip(state["param_groups"], saved, strict=True)
        ],
    }


def differences(state: Mapping[str, Any], names: ParameterNames | None) -> list[str]:
    """Return a message for each parameter group whose names differ from those of a saved state."""
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


def to_numbers(state: Mapping[str, Any], names: ParameterNames | None) -> dict[str, Any]:
    """Return a saved state with the parameter numbers of an optimizer with these names."""
    saved = [list(group["params"]) for group in state["param_groups"]]
    order = names if names is not None and _named(saved) and not differences(state, names) else saved
    number = {name: position for position, name in enumerate(name for group in order for name in group)}
    return {
        **state,
        "state": {number.get(name, name): entry for name, entry in state["state"].items()},
        "param_groups": [
            {**group, "params": [number[name] for name in own]}
            for group, own in zip(state["param_groups"], order, strict=True)
        ],
    }


def _named(groups: list[list[Any]]) -> bool:
    return all(isinstance(name, str) for group in groups for name in group)
