"""Notification hooks: any number of extensions and callbacks may implement them; results are ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from plugframe.hooks.markers import hookspec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.optim import Optimizer

    from plugframe.hooks.context import Context


class NotifySpec(Protocol):
    """Notification hooks; called on every rank, last registered first."""

    @hookspec
    def on_connect(self, context: Context) -> None:
        """Called once the collective is set up, before later kinds are: the ranks can communicate."""

    @hookspec
    def on_launch(self, context: Context) -> None:
        """Called once every provider is set up."""

    @hookspec
    def on_setup(self, module: torch.nn.Module) -> None:
        """Called after a module was set up."""

    @hookspec
    def on_backward(self, loss: Tensor) -> None:
        """Called after the backward of `loss`; gradients are available."""

    @hookspec
    def on_optimizer_step(self, optimizer: Optimizer) -> None:
        """Called after an optimizer step."""

    @hookspec
    def on_save(self, path: str, state: Any) -> None:
        """Called after a checkpoint was passed to the checkpoint plugin; it may still be writing."""

    @hookspec
    def on_load(self, path: str) -> None:
        """Called after a checkpoint was loaded."""

    @hookspec
    def on_teardown(self) -> None:
        """Called before anything is torn down."""

    @hookspec
    def on_disconnect(self) -> None:
        """Called before the collective is torn down, also if a set-up failed after `on_connect`."""
