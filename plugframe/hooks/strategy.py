"""The strategy contract: distribute modules, optimizers and data over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from plugframe.hooks.markers import per_plugin, provider

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.optim import Optimizer

    from plugframe.hooks.context import Context
    from plugframe.hooks.descriptor import Plugin

#: The object that runs a module's forward under a strategy: ``engine(call, *args, **kwargs)`` must run
#: ``call(*args, **kwargs)``, the user's own forward. None: the forward runs unchanged.
Engine = Any


def no_step(closure: Callable[[], Any] | None = None) -> None:
    """Do nothing: the `step` of a skipped optimizer step, see `StrategySpec.strategy_skip_step`."""


class StrategySpec(Protocol):
    """Hooks of the kind ``strategy``. Communicate through ``context.hooks.collective_…``."""

    @provider
    def strategy_describe(self) -> Sequence[str]:
        """Return extra lines for ``plugframe run --dry-run``, usually none.

        Called once in the process of the command, where no other hook of the strategy is called.

        Example:
            ``return [f"config: {json.dumps(self.config)}"]``
        """
        ...

    @provider
    def strategy_setup(self, context: Context) -> None:
        """Prepare this rank: meshes, groups, global state.

        Called once on every rank, after accelerator, collective and precision are set up.

        Raises:
            UnsupportedError: if the strategy cannot work with this world, device or precision.
        """
        ...

    @provider
    def strategy_teardown(self) -> None:
        """Undo `strategy_setup`. Called once on every rank, also after an exception."""
        ...

    @provider(since=2)
    def strategy_compose(self) -> Any:
        """Return the plugin object that takes this one's place where it is combined with other strategies.

        Called once on every rank, before `strategy_setup`. The default returns the object itself.

        Raises:
            SettingError: for an option that has no effect there.
        """
        return self

    @provider(since=2)
    def strategy_lead(self, base: Plugin) -> bool:
        """Return whether this strategy's hooks are those of the job where it is combined with `base`.

        For a strategy that runs the calls of a module, such as a pipeline, and sees to it that gradients are averaged
        over the axes of `base`: the object of `base`, which divides the batch, is then not set up and not called, and
        ``context.base`` is that object, for this strategy to use. Called once on every rank, before any set-up. The
        default returns False: this strategy transforms modules, see `strategy_parallelize`.

        Args:
            base: the descriptor of the strategy that divides the batch.

        Raises:
            UnsupportedError: if the two do not go together.
        """
        return False

    @provider(since=2)
    def strategy_parallelize(self, module: torch.nn.Module) -> None:
        """Apply a strategy that does not divide the batch to a module, in place, over its axes of ``context.mesh``.

        Called on every rank, by the strategy that divides the batch, with values that are equal on all ranks. Of a
        strategy like this one only `strategy_compose`, `strategy_setup`, this hook, `strategy_teardown`, and
        `strategy_state` and `strategy_load_state` are called.

        Example:
            ``parallelize_module(module, self.context.mesh["tensor"], plan)``
        """
        raise NotImplementedError

    @provider
    def strategy_init_context(self, empty_init: bool | None) -> AbstractContextManager[Any]:
        """Return the context in which users build a module under ``lite.init_module()``.

        Called on every rank. `empty_init` True requests parameters without storage, which `strategy_setup_module`
        materializes with the values of an eager build; see `plugframe.deferred.module`.
        """
        ...

    @provider
    def strategy_setup_module(self, module: torch.nn.Module) -> Engine:
        """Prepare a module, in place, and return its engine (or None).

        Called on every rank with the user's module, already on this rank's device and converted by the
        precision plugin. The module must stay usable directly: the engine is stored separately and does not wrap it.

        Example:
            ``return DistributedDataParallel(ForwardShim(module))``
        """
        ...

    @provider
    def strategy_setup_optimizers(
        self, module: torch.nn.Module | None, optimizers: Sequence[Optimizer]
    ) -> Sequence[Optimizer]:
        """Prepare optimizers and return them, in the same order.

        Called on every rank after `strategy_setup_module`. `module` is None for ``lite.setup_optimizers``.
        """
        ...

    @provider
    def strategy_setup_module_and_optimizers(
        self, module: torch.nn.Module, optimizers: Sequence[Optimizer]
    ) -> tuple[Engine, Sequence[Optimizer]]:
        """Prepare a module and its optimizers together: ``lite.setup(module, *optimizers)``.

        Called on every rank. The default calls the two hooks above in turn.
        """
        ...

    @provider
    def strategy_data_shard(self) -> tuple[int, int]:
        """Return ``(index, count)``: this rank reads shard `index` of `count` of the data.

        Called on every rank when a loader is set up. Ranks with equal index get equal batches.

        Example:
            ``return context.world.global_rank, context.world.world_size``
        """
        ...

    @provider
    def strategy_next_batch(self, iterator: Any, exhausted: Any) -> Any:
        """Return the next batch of `iterator`, or `exhausted`.

        Called on every rank for every batch: it is in the hot path.

        Example:
            ``return next(iterator, exhausted)``
        """
        ...

    @provider
    def strategy_backward(
        self, loss: Tensor, module: torch.nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Compute gradients of `loss`; `args` and `kwargs` go to ``Tensor.backward``.

        Called on every rank: it is in the hot path. `module` is what the user passed as ``model=``. After it,
        gradients on N ranks equal those of one process on the global batch (law 6).
        """
        ...

    @provider
    def strategy_gather_later(
        self, values: Sequence[float], look: Callable[[Sequence[Sequence[float]]], None]
    ) -> Callable[[], Sequence[Sequence[float]]] | None:
        """Start an asynchronous comparison of a few numbers over ranks.

        Called on every rank before each optimizer step, with the optimizer's settings and counts: it is in the hot
        path, and must not block on other ranks or on a device. The default is `collective_gather_later`. A strategy
        that communicates in every step can piggyback the numbers instead: if they differ, it calls ``look(rows)`` on
        all ranks, which raises, and it returns a function that returns an empty sequence.

        Returns:
            A function, called one step later, that returns the numbers of all ranks, indexed by rank; None if the
            strategy cannot compare concurrently with its other collectives, which disables the comparison.
        """
        ...

    @provider
    def strategy_no_sync(self, module: torch.nn.Module, engine: Engine, enabled: bool) -> AbstractContextManager[Any]:
        """Return a context in which gradients accumulate locally if `enabled`, and are synchronised otherwise.

        Called on every rank around forward and backward of a micro-batch. Contexts nest; each restores the previous
        state on exit.
        """
        ...

    @provider
    def strategy_optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        """Run one optimizer step and return what it returns.

        Called on every rank: it is in the hot path. ``step(closure)`` is the user's own step.
        """
        ...

    @per_plugin
    def strategy_skip_step(self, optimizer: Optimizer) -> None:
        """Do what `strategy_optimizer_step` does besides updating parameters: an extension skips this step. Optional.

        Called on every rank in place of `strategy_optimizer_step`, if `skip_optimizer_step` of an extension returned
        True on any rank. The default is `strategy_optimizer_step` with a step that does nothing (`no_step` of
        `plugframe.hooks`), which is right for a strategy that updates parameters with that step alone: buffers are
        synchronised, and a loss scaler learns of an overflow. Any other strategy must implement this hook.
        """
        self.strategy_optimizer_step(optimizer=optimizer, step=no_step, closure=None)

    @per_plugin
    def strategy_scale_gradients(self, module: torch.nn.Module, factor: float) -> None:
        """Multiply the accumulated gradients of a module by `factor`, the same on all ranks. Optional.

        Called on every rank after the backward of the last micro-batch, outside of `strategy_no_sync`, if their losses
        have weights whose sum is known only then. The default multiplies each parameter's ``grad``; a strategy that
        keeps gradients elsewhere must implement this hook.
        """
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    @provider
    def strategy_zero_grad(self, owner: torch.nn.Module | Optimizer) -> None:
        """Clear gradients that are stored outside of the parameters' ``grad``.

        Called on every rank after ``zero_grad()`` of a module or optimizer that was set up. Most strategies store
        none, and do nothing.
        """
        ...

    @provider
    def strategy_clip_gradients(
        self,
        module: torch.nn.Module,
        parameters: Sequence[Tensor],
        clip_value: float | None,
        max_norm: float | None,
        norm_type: float,
        error_if_nonfinite: bool,
    ) -> Tensor | None:
        """Clip the gradients of `parameters`, by value (`clip_value`) or by total norm (`max_norm`).

        Called on every rank, after gradients were unscaled. Exactly one of the two limits is set.

        Returns:
            For clipping by norm the total norm before clipping (a 0-d tensor), equal on all ranks; else None.

        Raises:
            RuntimeError: if the norm is not finite and `error_if_nonfinite`, on all ranks.
        """
        ...

    @provider
    def strategy_module_state(self, module: torch.nn.Module, sharded: bool) -> dict[str, Any]:
        """Return the module's ``state_dict()``: the user's keys, full tensors, or this rank's shards if `sharded`.

        Called on every rank while saving.
        """
        ...

    @provider
    def strategy_load_module_state(
        self, module: torch.nn.Module, state: dict[str, Any], strict: bool
    ) -> tuple[list[str], list[str]]:
        """Load the result of `strategy_module_state`; return the missing and the unexpected keys.

        Called on every rank while loading, with the same `state` on all. Does not raise for keys: the caller
        reports both lists at once.
        """
        ...

    @provider
    def strategy_optimizer_state(self, optimizer: Optimizer, sharded: bool) -> dict[str, Any]:
        """Return the optimizer's ``state_dict()``, full or sharded. Called on every rank while saving."""
        ...

    @provider
    def strategy_load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Load the result of `strategy_optimizer_state`. Called on every rank while loading."""
        ...

    @per_plugin
    def strategy_state(self) -> dict[str, Any]:
        """Return the state of the strategy itself for checkpoints. Optional, with `strategy_load_state`.

        Called on every rank by ``lite.save`` and ``lite.load``, as `extension_state`, which describes the values and
        the name they are saved under. State that belongs to a module or an optimizer is part of
        `strategy_module_state` and `strategy_optimizer_state`.
        """
        return {}

    @per_plugin
    def strategy_load_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `strategy_state`. Called on every rank by ``lite.load``, as `extension_load_state`."""
        return None
