"""Run user hooks on full gradients of sharded parameters.

torch sets a sharded gradient outside of autograd, where the parameter's hooks do not run: the strategy runs
them after each backward, whether they were registered before or after set-up.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils.hooks import RemovableHandle

#: Attributes for hooks on the full gradient, and for hooks after accumulation.
_HOOKS, _POST = "_plugframe_hooks", "_plugframe_post_hooks"


def add_hook(parameter: Tensor, hook: Callable[..., Any]) -> RemovableHandle:
    """Run ``hook(gradient)`` on the full, averaged gradient of each backward; a returned tensor replaces it."""
    return _added(parameter, _HOOKS, hook)


def add_post_hook(parameter: Tensor, hook: Callable[..., Any]) -> RemovableHandle:
    """Run ``hook(parameter)`` after each backward that averaged gradients."""
    return _added(parameter, _POST, hook)


def _added(parameter: Tensor, key: str, hook: Callable[..., Any]) -> RemovableHandle:
    hooks: OrderedDict[int, Callable[..., Any]] = vars(parameter).setdefault(key, OrderedDict())
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


def move_hooks(old: Tensor, new: Tensor) -> None:
    """Move the hooks registered on `old` to `new`; the user's handles still remove them."""
    # The dicts themselves are shared with the handles (torch 2.13: private names, as no public one exists).
    for source, key in (("_backward_hooks", _HOOKS), ("_post_accumulate_grad_hooks", _POST)):
        hooks = getattr(old, source, None)
        if hooks:
            vars(new)[key] = hooks


def hooked(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters that have hooks."""
    return [p for p in parameters if p.__dict__.get(_HOOKS) or p.__dict__.get(_POST)]


@torch.no_grad()
def gradients_before(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor | None]:
    """Return copies of the gradients that a backward accumulates into."""
    return {p: None if p.grad is None else p.grad.detach().clone() for p in parameters}


@torch.no_grad()
def run_hooks(before: dict[nn.Parameter, Tensor | None]) -> None:
    """Run the hooks on the gradients of a backward. Every rank must call it: full gradients are gathered."""
    for parameter, held in before.items():
        gradient = parameter.grad
        if gradient is None:
            continue
        if parameter.__dict__.get(_HOOKS):
            added = gradient if held is None else gradient - held
            changed = _through(parameter, added)
            if changed is not added:
                gradient.copy_(changed if held is None else held + changed)
        for hook in tuple(parameter.__dict__.get(_POST, {}).values()):
            with implicit_replication():  # a user's mask is the same on all ranks
                hook(parameter)


def _through(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    whole = full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    for hook in tuple(parameter.__dict__[_HOOKS].values()):
        returned = hook(full)
        full = full if returned is None else returned
    if full is whole:
        return gradient
    if not isinstance(gradient, DTensor):
        return full
    return distribute_tensor(
        full.to(gradient.dtype).contiguous(), gradient.device_mesh, gradient.placements, src_data_rank=None
    )
