"""The state of modules and optimizers whose tensors are ``DTensor``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from plugframe.checkpoint import StoredTensor, fill, materialize


def full_state(state: Any, *, keep: bool) -> Any:
    """Return `state` (any nesting) with every ``DTensor`` gathered on the CPU if `keep`, else left out.

    Every rank must call it; a rank without `keep` holds one full tensor at a time.
    """
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: full_state(value, keep=keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(full_state(value, keep=keep) for value in state)
    return state


def load_module_state(
    module: nn.Module, own: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Load `state` into the module, each rank its shard of each tensor; return missing and unexpected keys.

    Args:
        own: the module's ``state_dict()``.
        state: full tensors, or tensors stored in a checkpoint.
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
    """Load a state in torch's format, each rank its shard of each tensor."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=True))
    pairs: list[tuple[Tensor, Tensor | StoredTensor]] = []
    entries: dict[Any, Any] = {}
    for number, kept in state["state"].items():
        if number not in by_number:  # state of the optimizer as such, of no parameter
            entries[number] = materialize(kept)
            continue
        parameter = by_number[number]
        now = optimizer.state.get(parameter, {})
        entries[number] = {name: _place(value, parameter, now.get(name), pairs) for name, value in kept.items()}
    fill(pairs)
    # Group settings may be tensors too.
    optimizer.load_state_dict({**state, "state": entries, "param_groups": materialize(state["param_groups"])})


def _place(value: Any, parameter: Tensor, now: Any, pairs: list[tuple[Tensor, Tensor | StoredTensor]]) -> Any:
    """Return a tensor for `value`, sharded as the current entry is, or as its parameter is."""
    if not isinstance(value, (Tensor, StoredTensor)):
        return materialize(value)
    if not isinstance(parameter, DTensor) or not len(value.shape):
        return materialize(value)
    if isinstance(now, DTensor) and now.shape == value.shape:
        target = torch.empty_like(now, dtype=value.dtype)
    elif value.shape == parameter.shape:
        target = torch.empty_like(parameter, dtype=value.dtype)
    else:  # of another shape, such as Adafactor's rows: replicated
        local = torch.empty(value.shape, dtype=value.dtype, device=parameter.device)
        mesh = parameter.device_mesh
        target = DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
    pairs.append((target, value))
    return target
