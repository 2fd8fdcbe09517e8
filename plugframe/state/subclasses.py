"""Load tensors of subclasses: into live ones of the same class, never through a class that a file names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.checkpoint.stored import StoredTensor
from plugframe.checkpoint.subclass import FlattenedTensor, is_wrapper, name_of


def is_subclass_entry(value: Any, loaded: Any) -> bool:
    """Return whether a tensor, or the saved value for it, is of a subclass."""
    return isinstance(loaded, FlattenedTensor) or is_wrapper(value)


def subclass_mismatch(where: str, value: Tensor, loaded: Any) -> str | None:
    """Return why a tensor cannot take a saved value where one of both is of a subclass, None if it can."""
    if isinstance(loaded, FlattenedTensor):
        problem = loaded.problem(value)
        return problem and f"{where} {problem}"
    what = "a plain tensor" if isinstance(loaded, (Tensor, StoredTensor)) else f"a {type(loaded).__name__}"
    return f"{where} is {name_of(value)}, the checkpoint has {what}: load it before the model is converted"


def take_subclasses(module: nn.Module, matched: dict[str, Any]) -> tuple[list[Callable[[], object]], list[str]]:
    """Remove tensors of subclasses from a saved state of `module`; return the calls that load them, and problems.

    They are written in place, since ``load_state_dict`` needs operations that a subclass may lack.
    """
    saved = {name: value for name, value in matched.items() if isinstance(value, FlattenedTensor)}
    named = (module.named_parameters, module.named_buffers)
    live = {name: tensor for each in named if saved for name, tensor in each(remove_duplicate=False)}
    writes: list[Callable[[], object]] = []
    problems: list[str] = []
    for name, value in saved.items():
        del matched[name]
        target = live.get(name)
        problem = "is not held by the module on this rank" if target is None else value.problem(target)
        if problem is not None:
            problems.append(f"{name} {problem}")
        else:
            writes.append(lambda value=value, target=target: value.load_into(target))  # type: ignore[misc]
    return writes, problems


def rebuilt_state(optimizer: Optimizer, state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return an optimizer's saved state with tensors of subclasses like those that it has, and problems.

    Of an optimizer without a state, a tensor of the same class as its parameter serves as the model.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    entries = dict(state["state"])
    problems: list[str] = []
    for number, parameter in zip(numbers, parameters, strict=True):
        entry = entries.get(number)
        if not isinstance(entry, Mapping):
            continue
        now = optimizer.state.get(parameter, {})
        made = dict(entry)
        for name, value in entry.items():
            if not isinstance(value, FlattenedTensor):
                continue
            live = now.get(name) if isinstance(now, Mapping) and name in now else parameter
            if value.problem(live) is None:
                made[name] = value.like(live)
            else:
                del made[name]
                problems.append(
                    f"{name} of parameter {number} is a {value.class_name}, which the optimizer has none of to load it "
                    "into: load into an optimizer that has made a step"
                )
        entries[number] = made
    return {**state, "state": entries}, problems
