"""State of modules and optimizers sharded by DeepSpeed: full tensors, or ``DTensor`` on a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from plugframe.checkpoint import StoredTensor, fill, materialize
from plugframe_builtins.deepspeed.engine import Engine
from plugframe_builtins.deepspeed.fragments import Fragments, extent, gathered

#: Returns what this rank saves of a full tensor.
Keep = Callable[[Tensor], Any]
_Value = Tensor | StoredTensor


def make_keep(mesh: DeviceMesh | None, rank: int) -> Keep:
    """Return a function that keeps this rank's rows of a tensor, or, without a mesh, the full tensor on rank 0."""

    def share(full: Tensor) -> Any:
        if full.dim() == 0:
            return full
        part = distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None)
        # A view would keep the full tensor alive.
        own = part.to_local().clone()
        return DTensor.from_local(
            own, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.contiguous().stride()
        )

    def on_first(full: Tensor) -> Any:
        return full.cpu() if rank == 0 else None

    return on_first if mesh is None else share


@torch.no_grad()
def module_state(module: nn.Module, engine: Engine, keep: Keep, *, sharded: bool) -> dict[str, Any]:
    """Return the module's ``state_dict()`` with full parameters, in float32 where available.

    Every rank must call it; one parameter at a time is gathered.
    """
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    made: dict[int, Any] = {}
    for key, value in state.items():
        if not isinstance(value, nn.Parameter):
            state[key] = value.detach() if isinstance(value, Tensor) else value
            continue
        if id(value) not in made:
            made[id(value)] = _saved(value, engine, keep, sharded=sharded)
        state[key] = made[id(value)]
    return state


def _saved(parameter: nn.Parameter, engine: Engine, keep: Keep, *, sharded: bool) -> Any:
    fragment = engine.fragments.get(parameter)
    if fragment is not None and fragment.flat.dtype is not parameter.dtype:
        return keep(engine.fragments.full(parameter))
    if not hasattr(parameter, "ds_id"):  # replicated
        return parameter.detach() if sharded else keep(parameter.detach())
    with gathered(parameter) as full:
        return keep(full.clone())


@torch.no_grad()
def load_module_state(module: nn.Module, engine: Engine, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Load `state` into the module and the optimizer's weights; return missing and unexpected keys."""
    own: dict[str, Any] = module.state_dict(keep_vars=True)
    buffers: list[tuple[Tensor, _Value]] = []
    rest: dict[str, Any] = {}
    done: set[int] = set()
    for key, value in own.items():
        if key not in state:
            continue
        if not isinstance(value, Tensor):
            rest[key] = materialize(state[key])
        elif not isinstance(value, nn.Parameter):
            buffers.append((value.detach(), state[key]))
        elif id(value) not in done:
            done.add(id(value))
            _load_parameter(value, engine, _whole(state[key]))
    fill(buffers)
    if rest:
        with engine.guard.opened():
            module.load_state_dict(rest, strict=False)
    return [key for key in own if key not in state], [key for key in state if key not in own]


def _load_parameter(parameter: nn.Parameter, engine: Engine, value: Tensor) -> None:
    value = value.to(parameter.device)
    with gathered(parameter, write=True) as full:
        full.copy_(value)
    fragment = engine.fragments.get(parameter)
    if fragment is not None and fragment.flat is not parameter:
        engine.fragments.put(parameter, value)


def _whole(value: Any) -> Tensor:
    if isinstance(value, StoredTensor):
        return value.read()
    return value.full_tensor() if isinstance(value, DTensor) else value


# ---------------------------------------------------------------------- optimizers


@torch.no_grad()
def optimizer_state(engine: Engine, keep: Keep) -> dict[str, Any]:
    """Return the optimizer's state in torch's format, by user parameter. Every rank must call it."""
    entries: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    number = 0
    for group in engine.borrowed.optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append({**settings, "params": list(range(number, number + len(group["params"])))})
        for parameter in group["params"]:
            kept = _entry(parameter, engine, keep)
            if kept:
                entries[number] = kept
            number += 1
    state: dict[str, Any] = {"state": entries, "param_groups": groups}
    scale = engine.zero.scale_state()
    return {**state, "loss_scale": scale} if scale else state


def _entry(parameter: Tensor, engine: Engine, keep: Keep) -> dict[str, Any]:
    fragment = engine.fragments.get(parameter)
    if fragment is None:
        return {}
    kept = {}
    for name, value in engine.borrowed.state.get(fragment.flat, {}).items():
        if isinstance(value, Tensor) and value.dim() and value.shape == fragment.flat.shape:
            kept[name] = keep(engine.fragments.full(parameter, value))
        else:
            kept[name] = value.clone() if isinstance(value, Tensor) else value
    return kept


@torch.no_grad()
def load_optimizer_state(engine: Engine, state: Mapping[str, Any]) -> None:
    """Load a state in torch's format, by user parameter."""
    loader = _Loader(engine.fragments, engine.borrowed.state)
    entries = state["state"]
    engine.zero.load_scale_state(state.get("loss_scale", {}))
    with engine.borrowed.lent():
        loader.clear()
    for group, saved in zip(engine.borrowed.optimizer.param_groups, state["param_groups"], strict=True):
        group.update({key: materialize(value) for key, value in saved.items() if key != "params"})
        for parameter, number in zip(group["params"], saved["params"], strict=True):
            if number in entries:
                loader.load(parameter, entries[number])


class _Loader:
    """Fill the state of flat tensors from the state of their parameters."""

    def __init__(self, fragments: Fragments, state: Any) -> None:
        self._fragments = fragments
        self._state = state

    def clear(self) -> None:
        """Drop all state."""
        for entry in self._state.values():
            for name in list(entry):
                if isinstance(entry[name], Tensor):
                    entry[name].zero_()  # DeepSpeed may have linked it

    def load(self, parameter: Tensor, entry: Mapping[str, Any]) -> None:
        """Load one parameter's state."""
        fragment = self._fragments.get(parameter)
        if fragment is None:
            return
        kept = self._state[fragment.flat] if fragment.flat in self._state else self._state.setdefault(fragment.flat, {})
        _, shape = extent(parameter)
        for name, value in entry.items():
            if isinstance(value, (Tensor, StoredTensor)) and value.shape == shape and name != "step":
                if name not in kept:
                    kept[name] = torch.zeros_like(fragment.flat)
                self._fragments.put(parameter, _whole(value).to(fragment.flat.device), kept[name])
            elif isinstance(kept.get(name), Tensor):
                kept[name].copy_(_whole(value))
            else:
                full = materialize(value)
                kept[name] = full.clone() if isinstance(full, Tensor) else full
