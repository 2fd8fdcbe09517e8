"""Modules of Lightning, whose ``self.log``, ``self.logger`` and ``self.manual_backward`` go through a `Lite`.

A ``LightningModule`` keeps the object that runs it under an attribute of its own, and its optimizers under another. It
is known by these, so that Lightning need not be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from plugframe.adopt import state_of
from plugframe.adopt.module import compiled_from

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite

_RUNNER, _OPTIMIZERS = "_fabric", "_fabric_optimizers"
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def step_methods(module: nn.Module) -> tuple[str, ...]:
    """Return the steps of a ``LightningModule``, which run under the strategy; none for another module."""
    original = _original(module)
    if _RUNNER not in vars(original):
        return ()
    return tuple(name for name in _STEPS if callable(getattr(type(original), name, None)))


def connect(lite: Lite, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Let a ``LightningModule`` log and step through `lite` until tear-down, and let `Lite.call` call its hooks."""
    original = _original(module)
    if _RUNNER not in vars(original):
        return
    plain: dict[str, object] = {_RUNNER: None, _OPTIMIZERS: []}
    vars(original).update({_RUNNER: lite, _OPTIMIZERS: list(optimizers)})
    state_of(original).plain_values = plain
    lite._session.on_close(vars(original).update, plain)
    if not any(callback is original for callback in lite._callbacks):
        lite._callbacks.append(original)
        lite._session.on_close(lite._callbacks.remove, original)


def _original(module: nn.Module) -> nn.Module:
    return compiled_from(module) or module
