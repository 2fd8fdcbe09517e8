"""Gather the full, unsharded state of a module or an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.core.runtime.session import Session
from plugframe.errors import SettingError
from plugframe.state.parameter_names import ParameterNamer
from plugframe.state.tree import collect
from plugframe.utils.tree import map_tensors


@torch.no_grad()
def full_state_dict(session: Session, obj: Any, *, all_ranks: bool, namer: ParameterNamer) -> dict[str, Any]:
    """Return the state of a module or an optimizer with unsharded tensors on the CPU; see ``Lite.state_dict``."""
    if not isinstance(obj, (nn.Module, Optimizer)):
        raise SettingError(f"state_dict() takes a module or an optimizer, got {type(obj).__name__}.")
    hooks, first = session.hooks, session.world.global_rank == 0
    if isinstance(obj, Optimizer):
        state = hooks.strategy_optimizer_state(optimizer=obj, sharded=False)
    else:
        state = collect({"object": obj}, hooks, sharded=False, namer=namer)["object"]
    state = map_tensors(_copy_to_cpu, state) if first else {}
    if all_ranks and session.world.world_size > 1:
        state = _broadcast(session, state)
    return dict(state)


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    copy = tensor.detach().cpu()
    return copy.clone() if copy.data_ptr() == tensor.data_ptr() else copy


def _broadcast(session: Session, state: Any) -> Any:
    """Return rank 0's state on all ranks: broadcast its structure first, then one tensor at a time."""
    hooks = session.hooks
    tensors: list[Tensor] = []

    def to_meta(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    structure = map_tensors(to_meta, state)
    structure = hooks.collective_broadcast_object(obj=structure, src=0, group=None)
    remaining = iter(tensors)

    def receive(target: Tensor) -> Tensor:
        mine = next(remaining, None)
        sent = torch.empty_like(target, device=session.device) if mine is None else mine.to(session.device)
        received: Tensor = hooks.collective_broadcast(tensor=sent, src=0, group=None) if target.numel() else sent
        return received.cpu()

    return map_tensors(receive, structure)
