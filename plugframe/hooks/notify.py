"""Notifications: hooks any number of extensions and callbacks may implement; results are ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from plugframe.hooks.markers import hookspec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.optim import Optimizer

    from plugframe.hooks.context import Context


class NotifySpec(Protocol):
    """Hooks that tell; they are called on every rank, last registered first."""

    @hookspec
    def on_connect(self, context: Context) -> None:
        """The ranks can communicate: the collective is set up, and what is set up after it is not."""

    @hookspec
    def on_launch(self, context: Context) -> None:
        """Every provider is set up; the job runs."""

    @hookspec
    def on_setup(self, module: torch.nn.Module) -> None:
        """A module was set up."""

    @hookspec
    def on_backward(self, loss: Tensor) -> None:
        """Gradients of `loss` are there."""

    @hookspec
    def on_optimizer_step(self, optimizer: Optimizer) -> None:
        """An optimizer step ended."""

    @hookspec
    def on_save(self, path: str, state: Any) -> None:
        """A checkpoint was handed to the checkpoint plugin."""

    @hookspec
    def on_load(self, path: str) -> None:
        """A checkpoint was loaded."""

    @hookspec
    def on_teardown(self) -> None:
        """Called before anything is torn down."""

    @hookspec
    def on_disconnect(self) -> None:
        """Called before the collective is torn down, also where a set-up has failed after `on_connect` was called."""
