"""The state of a model and its optimizers under a pipeline: gathered from the stages, and loaded into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from plugframe.base import map_tensors
from plugframe.checkpoint import as_bytes, fill, materialize
from plugframe.errors import OutOfSyncError
from plugframe_builtins._shared.sharding.state import load_optimizer_state as load_shards
from plugframe_builtins.pipeline.axis import Axis
from plugframe_builtins.pipeline.optimizers import is_other, own_state

#: Puts a tensor in place of one that the rank at a position of the axis has.
Place = Callable[[Tensor, int], Any]


class Layout:
    """Describe tensors that only some ranks hold as tensors of all.

    Args:
        axis: the ranks of the pipeline.
    """

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._meshes: list[DeviceMesh] = []

    def full(self, keep: bool) -> Place:
        """Return a function that gives every rank's tensors to the first rank, on the CPU; all ranks must call it."""

        def place(tensor: Tensor, owner: int) -> Any:
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            whole = self._axis.broadcast(tensor, owner) if tensor.numel() and self._axis.size > 1 else tensor
            return whole.detach().cpu() if keep else None

        return place

    def shards(self) -> Place:
        """Return a function that makes a ``DTensor`` of a tensor, which only its owner and the replicas hold."""
        if not self._meshes:
            device = self._axis.device.type
            # Every rank makes every mesh: groups are made together.
            self._meshes = [DeviceMesh(device, list(ranks)) for ranks in self._axis.replicas]

        def place(tensor: Tensor, owner: int) -> Any:
            if not tensor.dim():  # a rank outside of its mesh gives a 0-d DTensor another shape (torch 2.13)
                return self._axis.broadcast(tensor.detach(), owner)
            if isinstance(tensor, DTensor):
                return tensor
            mine = owner == self._axis.rank
            local = tensor.detach() if mine else tensor.new_empty((0,) * tensor.dim())
            stride = torch.empty(tensor.shape, device="meta").stride()
            return DTensor.from_local(
                local.contiguous(),
                self._meshes[owner],
                [Replicate()],
                run_check=False,
                shape=tensor.shape,
                stride=stride,
            )

        return place


def module_state(module: nn.Module, owners: Mapping[str, int | None], axis: Axis, place: Place) -> dict[str, Any]:
    """Return the state of all stages under the user's names.

    Args:
        owners: stage of every parameter and buffer, by name.
    """
    state: dict[str, Any] = {}
    own = module.state_dict(keep_vars=True)
    _check_equal({key: value for key, value in own.items() if owners.get(key) is None}, axis)
    for key, value in own.items():
        owner = owners.get(key)
        if not isinstance(value, Tensor) or owner is None:
            state[key] = value.detach() if isinstance(value, Tensor) else value
        else:
            state[key] = place(_held(value, owner % axis.size == axis.rank, axis), owner % axis.size)
    return state


def _check_equal(buffers: Mapping[str, Any], axis: Axis) -> None:
    """Raise if buffers that every rank keeps differ: no stage owns them.

    Raises:
        OutOfSyncError: on all ranks, naming one.
    """
    held = {key: tensor.detach().cpu().contiguous() for key, tensor in buffers.items() if isinstance(tensor, Tensor)}
    if not held or axis.size == 1:
        return
    everyone = axis.gather_objects([xxhash.xxh3_64_intdigest(as_bytes(tensor)) for tensor in held.values()])
    for key, digests in zip(held, zip(*everyone, strict=True), strict=True):
        if len(set(digests)) > 1:
            raise OutOfSyncError(
                f"Buffer {key!r} differs between ranks: it belongs to no stage, and a forward changes it on some. Name "
                "its module in a stage (pipeline_plan, or split= with patterns)."
            )


def load_module_state(
    module: nn.Module, owners: Mapping[str, int | None], axis: Axis, state: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Load this rank's part of a state; return missing and unexpected keys."""
    own = module.state_dict(keep_vars=True)
    pairs: list[tuple[Tensor, Any]] = []
    rest: dict[str, Any] = {}
    for key, value in own.items():
        if key not in state:
            continue
        owner = owners.get(key)
        if not isinstance(value, Tensor):
            rest[key] = materialize(state[key])
        elif owner is None or owner % axis.size == axis.rank:
            pairs.append((value.detach(), state[key]))
    fill(pairs)
    if rest:
        module.load_state_dict(rest, strict=False)
    return [key for key in own if key not in state], [key for key in state if key not in own]


def optimizer_state(optimizer: Optimizer, axis: Axis, place: Place) -> dict[str, Any]:
    """Return the optimizer's state with the entries of all ranks."""
    state = own_state(optimizer)
    mine = state["state"]
    shapes = [map_tensors(_shape, mine)] if axis.size == 1 else axis.gather_objects(map_tensors(_shape, mine))
    entries: dict[Any, Any] = {}
    for owner, held in enumerate(shapes):

        def placed(tensor: Tensor, owner: int = owner) -> Any:
            return place(tensor, owner) if tensor.dim() else tensor

        for key, entry in held.items():
            if key in entries:
                continue  # of no parameter: the first rank's
            source = mine[key] if owner == axis.rank else map_tensors(lambda t: _empty(t, axis), entry)
            entries[key] = map_tensors(placed, source)
    ordered = sorted(entries, key=lambda key: (not isinstance(key, int), key if isinstance(key, int) else 0))
    return {**state, "state": {key: entries[key] for key in ordered}}


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load the entries of this rank's parameters."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    others = {number for number, other in zip(numbers, is_other(optimizer), strict=True) if other}
    load_shards(optimizer, {**state, "state": {k: entry for k, entry in state["state"].items() if k not in others}})


def _held(tensor: Tensor, mine: bool, axis: Axis) -> Tensor:
    if mine:
        return tensor.detach()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=axis.device)


def _shape(tensor: Tensor) -> Tensor:
    """Return what is gathered first: a shape, or the value of a single number, such as Adam's step."""
    if not tensor.dim():
        return tensor.detach().cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _empty(tensor: Tensor, axis: Axis) -> Tensor:
    if not tensor.dim():
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=axis.device)
