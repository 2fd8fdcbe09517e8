"""Hooks of extensions and callbacks: notifications, a vote on optimizer steps, and state in checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from plugframe.hooks.markers import hookspec, per_plugin

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.optim import Optimizer

    from plugframe.hooks.context import Context


class NotifySpec(Protocol):
    """Hooks that any number of extensions and callbacks may implement; called on every rank, last registered first.

    Results of ``on_…`` hooks are ignored.
    """

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
    def skip_optimizer_step(self, optimizer: Optimizer) -> bool | None:
        """Return True to skip the optimizer step that the script requests.

        Called on every rank before each step of an optimizer that was set up, with gradients averaged and unscaled; a
        closure has not run yet. If any extension on any rank returns True, no rank makes the step: the strategy runs
        `strategy_skip_step` instead of `strategy_optimizer_step`, ``optimizer.step()`` returns None, and
        `on_optimizer_step` is not called. Gradients stay until ``zero_grad()``, as after an overflow under a loss
        scaler, which goes on counting overflows. If an extension implements this hook, every step has one more
        all-reduce; otherwise it costs nothing.

        To replace a step, update the parameters here and return True, in a way that is equal on all ranks.

        Example:
            ``return not math.isfinite(self.loss)``
        """

    @hookspec
    def on_optimizer_step(self, optimizer: Optimizer) -> None:
        """Called after an optimizer step, unless `skip_optimizer_step` skipped it."""

    @hookspec
    def on_log(self, metrics: dict[str, float], step: int | None) -> None:
        """Called by ``lite.log`` and ``lite.log_dict``, on every rank that calls them, before the loggers are.

        A script may log on rank 0 only, and ranks may log different values, so do not communicate here. What rank 0
        logs is recorded: a decision that is made from a metric is made from its value. Entries that are added to
        `metrics` are recorded with the others. Also called if there are no loggers.

        Args:
            metrics: values by name, as numbers.
            step: the step that the script passed, or None.

        Example:
            ``metrics["lr"] = self.optimizer.param_groups[0]["lr"]``
        """

    @hookspec
    def on_save(self, path: str, state: Any) -> None:
        """Called after a checkpoint was passed to the checkpoint plugin; it may still be writing."""

    @hookspec
    def on_load(self, path: str) -> None:
        """Called after a checkpoint was loaded."""

    @per_plugin
    def extension_state(self) -> dict[str, Any]:
        """Return the state of this extension or callback for checkpoints. Optional, with `extension_load_state`.

        Called on every rank by ``lite.save``, so that it may communicate; and by ``lite.load`` before
        `extension_load_state`, to learn which tensors are sharded and to undo a load that fails.

        Returns:
            A dict of tensors and plain values, nested at will. Plain values are saved from rank 0, and tensors must be
            equal on all ranks. Of a ``DTensor`` every rank saves its shard, or rank 0 the full tensor if the
            checkpoint format is not sharded. For values of each rank, gather them:
            ``{"ranks": hooks.collective_all_gather_object(obj=self.mine, group=None)}``.

        The state is saved under the plugin's qualified name (``"acme-ema:ema"``), or under the path of the class
        (``"train:EMA"``) for an object of a class that is not published. Of several objects of one class each needs an
        attribute ``state_key``, a string of its own, that is appended.
        """
        return {}

    @per_plugin
    def extension_load_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `extension_state`. Called on every rank by ``lite.load``, if the checkpoint has one.

        Called before model and optimizer are written. A tensor is a ``DTensor`` on this rank if `extension_state` now
        returns one of that shape in that place, on any number of ranks; any other tensor is complete and on the CPU.

        Raises:
            Exception: any, if the state does not fit. On all ranks nothing is changed then, and ``lite.load`` raises a
                CheckpointError that names the plugin.
        """

    @hookspec
    def on_teardown(self) -> None:
        """Called before anything is torn down."""

    @hookspec
    def on_disconnect(self) -> None:
        """Called before the collective is torn down, also if a set-up failed after `on_connect`."""
