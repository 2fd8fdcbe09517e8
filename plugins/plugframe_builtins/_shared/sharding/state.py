"""The state of modules and optimizers whose tensors are ``DTensor``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from plugframe.checkpoint import StoredTensor, fill, materialize


def whole(state: Any, *, keep: bool) -> Any:
    """Return `state` (any nesting) with every ``DTensor`` put together on the CPU, where `keep`; else left out.

    Every rank must call it; only one tensor at a time is whole on a rank that does not keep them.
    """
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: whole(value, keep=keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, keep=keep) for value in state)
    return state


def load_module_state(
    module: nn.Module, own: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Put `state` into the module, every rank its part of each tensor, and return missing and unexpected keys.

    Args:
        own: the module's ``state_dict()``.
        state: whole tensors, or such as lie in a checkpoint yet.
    """
    pairs = [
        (value, state[key])
        for key, value in own.items()
        if isinstance(value, Tensor) and isinstance(state.get(key), (Tensor, StoredTensor))
    ]
    fill(pairs)
    filled = {key for key, value in own.items() if isinstance(value, Tensor)}
    rest = {key: materialize(value) for key, value in state.items() if key in own and key not in filled}
    if rest:
        module.load_state_dict(rest, strict=False)
    return [key for key in own if key not in state], [key for key in state if key not in own]


@torch.no_grad()
def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state in torch's own format, every rank its part of each tensor."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=True))
    pairs: list[tuple[Tensor, Tensor | StoredTensor]] = []
    entries: dict[Any, Any] = {}
    for number, kept in state["state"].items():
        if number not in by_number:  # of no parameter: what the optimizer keeps for all of them
            entries[number] = materialize(kept)
            continue
        parameter = by_number[number]
        now = optimizer.state.get(parameter, {})
        entries[number] = {name: _place(value, parameter, now.get(name), pairs) for name, value in kept.items()}
    fill(pairs)
    # Settings of a group may be tensors, too.
    optimizer.load_state_dict({**state, "state": entries, "param_groups": materialize(state["param_groups"])})


def _place(value: Any, parameter: Tensor, now: Any, pairs: list[tuple[Tensor, Tensor | StoredTensor]]) -> Any:
    """Return a tensor that will hold `value`, spread as the entry is now, or as its parameter is."""
    if not isinstance(value, (Tensor, StoredTensor)):
        return materialize(value)
    if not isinstance(parameter, DTensor) or not len(value.shape):
        return materialize(value)
    if isinstance(now, DTensor) and now.shape == value.shape:
        target = torch.empty_like(now, dtype=value.dtype)
    elif value.shape == parameter.shape:
        target = torch.empty_like(parameter, dtype=value.dtype)
    else:  # of a shape of its own, such as Adafactor's rows: every rank has it all
        local = torch.empty(value.shape, dtype=value.dtype, device=parameter.device)
        mesh = parameter.device_mesh
        target = DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
    pairs.append((target, value))
    return target
