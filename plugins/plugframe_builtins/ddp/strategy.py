"""Data parallelism: replicated models, gradients averaged during backward."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.base import Strategy
from plugframe.deferred.module import is_deferred, materialize_module
from plugframe.errors import OrderError, SettingError, UnsupportedError
from plugframe.hooks import Engine as AnyEngine
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe.utils.logging import warn_caller
from plugframe.utils.registrations import Registrations
from plugframe_builtins._shared.broadcast import broadcast_from_first
from plugframe_builtins._shared.data_parallel.buckets import Send
from plugframe_builtins._shared.data_parallel.engine import Engine
from plugframe_builtins._shared.data_parallel.reducer import Backward
from plugframe_builtins._shared.data_parallel.settings_digest import MOST_RANKS, SettingsDigest
from plugframe_builtins._shared.model_check import check_same_model
from plugframe_builtins._shared.tensor_hooks import TensorHookCheck
from plugframe_builtins.ddp import plugin
from plugframe_builtins.ddp.batchnorm import sync_batchnorm
from plugframe_builtins.ddp.compression import check_compression, make_sender


class DDP(Strategy):
    """Replicate the model on every rank and average the gradients of all ranks in backward.

    Parameters and buffers are broadcast from rank 0 when a module is set up, and new ones at the next forward.
    Gradients equal those of one process on the full batch in all cases: several backwards, parameters
    frozen in between or unused on some ranks, loss terms outside of the forward, second derivatives. Options have
    the names and defaults of ``torch.nn.parallel.DistributedDataParallel``.

    Args:
        find_unused_parameters: let forwards leave parameters out. This always works, at no cost: accepted
            for scripts written for torch's DDP.
        static_graph: every step uses the same parameters in the same way. Accepted for the same reason.
        gradient_as_bucket_view: keep gradients in the communication buffers, saving their size in memory.
        bucket_cap_mb: size in MiB of one communication buffer; by default torch's 25.
        broadcast_buffers: broadcast rank 0's buffers (running statistics) after each optimizer step,
            so that all ranks evaluate the same model; otherwise each rank keeps its own.
        timeout_s: timeout of a gradient all-reduce in seconds; by default the collective's.
            A value creates a second process group.
        gradient_compression: ``"fp16"``, ``"bf16"`` or ``"powersgd"``; gradients are then approximate.
        powersgd: arguments of torch's ``PowerSGDState``, such as ``{"matrix_approximation_rank": 4}``. Its
            state is not checkpointed.
        sync_batchnorm: normalise over the batches of all ranks; on accelerators only.
        process_group: the group of all ranks to exchange gradients in, made by the script.
    """

    def __init__(
        self,
        *,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        bucket_cap_mb: int | None = None,
        broadcast_buffers: bool = True,
        timeout_s: float | None = None,
        gradient_compression: str | None = None,
        powersgd: Mapping[str, Any] | None = None,
        sync_batchnorm: bool = False,
        process_group: Any = None,
    ) -> None:
        plugin.validate(
            self,
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            gradient_as_bucket_view=gradient_as_bucket_view,
            bucket_cap_mb=bucket_cap_mb,
            broadcast_buffers=broadcast_buffers,
            timeout_s=timeout_s,
            gradient_compression=gradient_compression,
            sync_batchnorm=sync_batchnorm,
        )
        check_compression(gradient_compression, powersgd)
        if process_group is not None and timeout_s is not None:
            raise SettingError("DDP() takes one of process_group= and timeout_s=, got both: a group has its timeout.")
        self._of_buckets = {
            "gradient_as_bucket_view": gradient_as_bucket_view or None,
            "bucket_cap_mb": bucket_cap_mb,
            "broadcast_buffers": None if broadcast_buffers else False,
            "timeout_s": timeout_s,
            "gradient_compression": gradient_compression,
            "sync_batchnorm": sync_batchnorm or None,
            "process_group": process_group,
        }
        self.broadcast_buffers = broadcast_buffers
        self.timeout_s = timeout_s
        self.gradient_compression = gradient_compression
        self.powersgd = dict(powersgd or {})
        self.sync_batchnorm = sync_batchnorm
        self.bucket_cap_mb = bucket_cap_mb
        self.gradient_as_bucket_view = gradient_as_bucket_view
        # In the order of set-up: all ranks must iterate in the same order.
        self._engines: list[weakref.ref[Engine]] = []
        self._registrations = Registrations()
        self._backward = Backward()
        self._group: Any = None
        self._given_group = process_group
        self._undo = ExitStack()

    @hookimpl
    def strategy_setup(self, context: Context) -> None:
        super().strategy_setup(context)
        if self.sync_batchnorm and context.device.type in ("cpu", "mps"):
            raise UnsupportedError(
                f"sync_batchnorm=True does not work on {context.device.type}: torch has no SyncBatchNorm there. "
                "Leave it out, or use an accelerator that has it."
            )
        self._group = context.hooks.collective_process_group()
        if self._group is None:
            raise UnsupportedError(
                f"strategy 'ddp' needs a process group, and collective {context.names.get('collective')!r} has "
                "none: use collective='torch'."
            )
        self._undo.callback(self._registrations.watch())
        world = context.world
        self._hook_check = TensorHookCheck(warns=world.world_size > 1 and world.global_rank == 0)
        if 1 < context.world.world_size <= MOST_RANKS:
            self._backward.settings_digest = SettingsDigest(
                context.world.world_size, context.hooks.collective_all_gather_object
            )
        if self.timeout_s is not None:
            self._group = dist.new_group(timeout=timedelta(seconds=self.timeout_s))
            self._undo.callback(_destroy, self._group)
        elif self._given_group is not None:
            _check_all_ranks(self._given_group, world.world_size)
            self._group = self._given_group

    @hookimpl
    def strategy_compose(self) -> Strategy:
        for name, value in self._of_buckets.items():
            if value is not None:
                raise SettingError(
                    f"{name}={value!r} of strategy 'ddp' has no effect beside another strategy, where torch's "
                    "fully_shard averages the gradients: leave it out."
                )
        # Imported late: ddp alone needs nothing of it.
        from plugframe_builtins._shared.fully_shard.replicated import Replicated

        return Replicated("ddp")

    @hookimpl
    def strategy_teardown(self) -> None:
        self._group = self._backward.settings_digest = None
        for engine in self._alive():
            engine.disconnect()
        self._engines.clear()
        self._undo.close()

    def _alive(self) -> list[Engine]:
        return [engine for reference in self._engines if (engine := reference()) is not None]

    @hookimpl
    def strategy_setup_module(self, module: nn.Module) -> AnyEngine:
        _check_parameters(module)
        materialize_module(module, self.context.device)
        if self.sync_batchnorm:
            self._undo.callback(sync_batchnorm(module, warn=self.context.world.global_rank == 0))
        if not any(True for _ in module.parameters()):
            check_same_model(module, self.context.hooks)
            broadcast_from_first(module.buffers(), self._group)
            return None
        engine = Engine(
            module,
            group=self._group,
            check=functools.partial(check_same_model, hooks=self.context.hooks),
            registrations=self._registrations,
            backward=self._backward,
            bucket_cap_mb=self.bucket_cap_mb,
            as_views=self.gradient_as_bucket_view,
            make_send=self._make_send if self.gradient_compression is not None else None,
        )
        engine.broadcast_buffers = self.broadcast_buffers
        self._engines = [weakref.ref(each) for each in (*self._alive(), engine)]
        return engine

    def _make_send(self) -> Send:
        assert self.gradient_compression is not None
        return make_sender(self.gradient_compression, self.powersgd, self._group)

    @hookimpl
    def strategy_setup_optimizers(
        self, module: nn.Module | None, optimizers: Sequence[Optimizer]
    ) -> Sequence[Optimizer]:
        for engine in self._alive():
            if any(engine.owns(optimizer) for optimizer in optimizers):
                # Buffers are broadcast after each step instead of before each forward: once for any number of
                # micro-batches, and every rank evaluates the same model.
                engine.broadcast_buffers = False
        return optimizers

    @hookimpl
    def strategy_backward(
        self, loss: Tensor, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        for engine in self._alive():
            engine.before_backward()
            self._hook_check.look(engine.module.named_parameters)
        self._backward.run(super().strategy_backward, loss=loss, module=module, args=args, kwargs=kwargs)

    @hookimpl
    def strategy_gather_later(
        self, values: Sequence[float], look: Callable[[Sequence[Sequence[float]]], None]
    ) -> Callable[[], Sequence[Sequence[float]]] | None:
        check = self._backward.settings_digest
        if check is None or not any(engine.checks_settings for engine in self._alive()):
            return super().strategy_gather_later(values, look)
        check.note(values, look)
        return tuple  # nothing to wait for: the backward compares

    @hookimpl
    def strategy_no_sync(self, module: nn.Module, engine: AnyEngine, enabled: bool) -> AbstractContextManager[Any]:
        return nullcontext() if engine is None else engine.synchronizing(not enabled)

    @hookimpl
    def strategy_optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        for engine in self._alive():
            if engine.local and engine.owns(optimizer):
                engine.local = False
                self._warn_local(optimizer)
        result = super().strategy_optimizer_step(optimizer, step, closure)
        if self.broadcast_buffers:
            for engine in self._alive():
                if engine.stale_buffers and engine.owns(optimizer):
                    engine.sync_buffers()
        return result

    def _warn_local(self, optimizer: Optimizer) -> None:
        if self.context.world.global_rank == 0 and self.context.world.world_size > 1:
            warn_caller(
                f"{type(optimizer).__name__}.step() uses gradients that were accumulated under no_backward_sync() and "
                "never averaged: the ranks diverge. Run the last backward before a step outside of it."
            )


def _check_parameters(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise OrderError(f"Parameter {name!r} has no shape yet: run one forward before lite.setup().")
        if parameter.is_meta and not is_deferred(parameter):
            raise UnsupportedError(
                f"Parameter {name!r} is on the meta device, and strategy 'ddp' needs its values: "
                "use lite.init_module() or module.to_empty(device=lite.device) first."
            )


def _check_all_ranks(group: Any, num_ranks: int) -> None:
    """Raise if gradients would be averaged over some of the ranks.

    Raises:
        UnsupportedError: saying how many the group has.
    """
    found = dist.get_world_size(group)
    if found != num_ranks:
        raise UnsupportedError(
            f"process_group= of strategy 'ddp' has {max(found, 0)} of the job's {num_ranks} ranks, and replicas of the "
            "others would differ: pass a group of all ranks, or start a job for each group."
        )


def _destroy(group: Any) -> None:
    if dist.is_initialized():
        dist.destroy_process_group(group)
