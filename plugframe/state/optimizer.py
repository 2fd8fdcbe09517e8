"""Check a saved state of an optimizer, and convert it to the types of the optimizer that loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from plugframe.checkpoint.stored import StoredTensor, materialize
from plugframe.state.parameter_names import ParameterNames


def is_optimizer_state(value: Any) -> bool:
    """Return whether a value has the structure of ``optimizer.state_dict()``."""
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, (list, tuple)) and all(
        isinstance(group, Mapping)
        and isinstance(group.get("params"), (list, tuple))
        and all(isinstance(each, (int, str)) for each in group["params"])
        for group in groups
    )


def match_setting_types(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with the settings converted to the types the optimizer has now, and read from the checkpoint.

    A learning rate that is a tensor stays one, and a float stays a float, whatever was saved. Entries under
    ``"state"`` may remain a `StoredTensor`.
    """
    read = {key: value if key == "state" else materialize(value) for key, value in state.items()}
    read["param_groups"] = [
        {key: _match_type(now.get(key), value) for key, value in saved.items()}
        for now, saved in zip(optimizer.param_groups, read["param_groups"], strict=True)
    ]
    return read


def _match_type(now: Any, saved: Any) -> Any:
    if isinstance(now, Tensor) and isinstance(saved, (int, float)) and not isinstance(saved, bool):
        return torch.full_like(now, saved, requires_grad=False)
    if isinstance(now, Tensor) and isinstance(saved, Tensor):
        return saved.to(device=now.device, dtype=now.dtype)
    if isinstance(now, (int, float)) and isinstance(saved, Tensor) and saved.numel() == 1:
        return saved.item()
    return saved


def shape_mismatches(optimizer: Optimizer, state: Mapping[str, Any], names: ParameterNames | None) -> list[str]:
    """Return a message for each entry of a state whose shape does not match the optimizer's parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    flat_names = [name for group in names or [] for name in group]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=True))
    problems = []
    for position, number in enumerate(numbers):
        saved, parameter = state["state"].get(number), by_number[number]
        if saved is None:
            continue
        shown = flat_names[position] if flat_names else f"parameter {number}"
        if not isinstance(saved, Mapping):
            problems.append(f"the state of {shown} is a {type(saved).__name__}")
            continue
        now = optimizer.state.get(parameter, {})
        for name, value in saved.items():
            # The expected shape is known only for entries that have the parameter's shape now.
            mine = now.get(name) if isinstance(now, Mapping) else None
            if value is None or not isinstance(mine, Tensor) or mine.shape != parameter.shape or not mine.dim():
                continue
            if not isinstance(value, (Tensor, StoredTensor)) or value.shape != mine.shape:
                what = tuple(value.shape) if isinstance(value, (Tensor, StoredTensor)) else type(value).__name__
                problems.append(f"{name} of {shown} has shape {tuple(mine.shape)}, the checkpoint has {what}")
    return problems
