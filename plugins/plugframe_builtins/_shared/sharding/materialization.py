"""Materialise deferred parameters and buffers, one full tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from plugframe.deferred.malloc import release_freed


@torch.no_grad()
def materialize_shards(
    module: nn.Module,
    values: Mapping[str, Callable[[], Tensor]],
    *,
    device: torch.device,
    broadcast: Callable[[Tensor], None],
) -> None:
    """Replace the module's meta tensors by real ones with rank 0's values. Every rank must call it.

    Args:
        module: already sharded: deferred parameters are ``DTensor`` on the meta device.
        values: function per deferred parameter and buffer name that returns the full tensor.
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


def _made(
    old: Tensor, value: Callable[[], Tensor], device: torch.device, broadcast: Callable[[Tensor], None]
) -> Tensor:
    full = value()
    if isinstance(old, DTensor):
        # Rank 0 scatters the shards.
        part = distribute_tensor(full, old.device_mesh, old.placements)
        local = part.to_local()
        if local.untyped_storage().nbytes() > local.nbytes or local.device != device:
            part = DTensor.from_local(
                local.to(device, copy=True),
                old.device_mesh,
                old.placements,
                run_check=False,
                shape=old.shape,
                stride=old.stride(),
            )
        new: Tensor = part
    else:
        broadcast(full)
        new = full.to(device)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
