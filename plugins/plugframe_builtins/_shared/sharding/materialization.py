"""Materialise deferred parameters and buffers, one full tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from plugframe.deferred.malloc import release_freed
from plugframe.deferred.module import Deferred


@torch.no_grad()
def materialize_shards(
    module: nn.Module,
    values: Mapping[str, Deferred],
    *,
    device: torch.device,
    broadcast: Callable[[Tensor], None],
) -> None:
    """Replace the module's meta tensors by real ones with rank 0's values. Every rank must call it.

    Args:
        module: already sharded: deferred parameters are ``DTensor`` on the meta device.
        values: of deferred parameters and buffers, by name. What is read from a file, each rank reads for itself.
        device: where parameters are kept.
        broadcast: broadcasts rank 0's values of a tensor.
    """
    owners = dict(module.named_modules(remove_duplicate=False))
    made: dict[int, Tensor] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, old in named:
        if not old.is_meta:
            continue
        if id(old) not in made:
            made[id(old)] = _made(old, values[name], device, broadcast)
            release_freed(old.nbytes)
        path, _, leaf = name.rpartition(".")
        setattr(owners[path], leaf, made[id(old)])


def _made(old: Tensor, value: Deferred, device: torch.device, broadcast: Callable[[Tensor], None]) -> Tensor:
    own = _own_shard(old, value) if isinstance(old, DTensor) else None
    if own is not None:
        new: Tensor = _as_shard(own, old, device)
    elif isinstance(old, DTensor):
        # Rank 0 scatters the shards.
        part = distribute_tensor(value(), old.device_mesh, old.placements)
        local = part.to_local()
        if local.untyped_storage().nbytes() > local.nbytes or local.device != device:
            part = _as_shard(local.to(device, copy=True), old, device)
        new = part
    else:
        full = value()
        broadcast(full)
        new = full.to(device)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _own_shard(old: DTensor, value: Deferred) -> Tensor | None:
    """Return this rank's shard if it can be read by itself; None on all ranks alike otherwise."""
    if any(type(placement) not in (Shard, Replicate) for placement in old.placements):
        return None
    shape, offset = compute_local_shape_and_global_offset(old.shape, old.device_mesh, old.placements)
    return value.part(tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True)))


def _as_shard(local: Tensor, old: Tensor, device: torch.device) -> DTensor:
    assert isinstance(old, DTensor)
    return DTensor.from_local(
        local.to(device),
        old.device_mesh,
        old.placements,
        run_check=False,
        shape=old.shape,
        stride=old.stride(),
    )
