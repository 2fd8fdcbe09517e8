"""The complete state of one object, as a plain process can read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.core.runtime.session import Session
from plugframe.errors import SettingError
from plugframe.state.parameter_names import Naming
from plugframe.state.tree import collect
from plugframe.utils.tree import map_tensors


@torch.no_grad()
def whole_state(session: Session, obj: Any, *, all_ranks: bool, naming: Naming) -> dict[str, Any]:
    """Return the state of a module or an optimizer with complete tensors on the CPU; see ``Lite.state_dict``."""
    if not isinstance(obj, (nn.Module, Optimizer)):
        raise SettingError(f"state_dict() takes a module or an optimizer, got {type(obj).__name__}.")
    hooks, first = session.hooks, session.world.global_rank == 0
    if isinstance(obj, Optimizer):
        state = hooks.strategy_optimizer_state(optimizer=obj, sharded=False)
    else:
        state = collect({"object": obj}, hooks, sharded=False, naming=naming)["object"]
    state = map_tensors(_copied, state) if first else {}
    if all_ranks and session.world.world_size > 1:
        state = _sent(session, state)
    return dict(state)


def _copied(tensor: Tensor) -> Tensor:
    copy = tensor.detach().cpu()
    return copy.clone() if copy.data_ptr() == tensor.data_ptr() else copy


def _sent(session: Session, state: Any) -> Any:
    """Return rank 0's state on all ranks: its structure first, then one tensor at a time."""
    hooks = session.hooks
    tensors: list[Tensor] = []

    def number(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    outline = map_tensors(number, state)
    outline = hooks.collective_broadcast_object(obj=outline, src=0, group=None)
    waiting = iter(tensors)

    def receive(slot: Tensor) -> Tensor:
        mine = next(waiting, None)
        sent = torch.empty_like(slot, device=session.device) if mine is None else mine.to(session.device)
        received: Tensor = hooks.collective_broadcast(tensor=sent, src=0, group=None) if slot.numel() else sent
        return received.cpu()

    return map_tensors(receive, outline)
