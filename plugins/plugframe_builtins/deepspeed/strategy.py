"""ZeRO with DeepSpeed: sharded optimizer state, gradients and parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from plugframe.base import sync_buffers
from plugframe.errors import CheckpointError, OrderError, UnsupportedError
from plugframe.hooks import Engine as AnyEngine
from plugframe.hooks import hookimpl
from plugframe.utils.logging import warn_caller
from plugframe_builtins.deepspeed import config as configs
from plugframe_builtins.deepspeed import plugin
from plugframe_builtins.deepspeed.clip import clip_by_norm, clip_by_value
from plugframe_builtins.deepspeed.engine import Engine
from plugframe_builtins.deepspeed.library import library
from plugframe_builtins.deepspeed.setup import SetUp
from plugframe_builtins.deepspeed.slot import Slot
from plugframe_builtins.deepspeed.state import (
    load_module_state,
    load_optimizer_state,
    make_keep,
    module_state,
    optimizer_state,
)


class DeepSpeed(SetUp):
    """Shard optimizer state (stage 1), gradients (2) and parameters (3) over ranks with DeepSpeed's ZeRO.

    The module, the optimizer and its groups stay the user's: values that a scheduler writes into a group apply, and
    gradients are reset by ``zero_grad``, used by ``step`` and clipped by ``lite.clip_gradients``. DeepSpeed
    updates many parameters as one flat tensor, so an optimizer must treat every element independently, as SGD and Adam
    do, and a missing gradient counts as zeros. A step with gradients that are not
    finite is skipped. After tear-down the module holds its parameters as before, except in stage 3 on several
    ranks, where they are empty, and the optimizer has no state: save both before.

    Any other access of a script to parameters and gradients works as in plain torch, or raises and names the
    parameter: ``docs/large-models.md`` has the table. An optimizer of unknown class
    is tested at set-up, and refused if it updates a flat tensor differently from its parameters.

    Args:
        stage: 0, 1, 2 or 3.
        offload_optimizer: keep the optimizer's state on ``"cpu"`` or ``"nvme"`` (stage 3).
        offload_params: keep parameters on ``"cpu"`` or ``"nvme"`` (stage 3).
        nvme_path: the folder for what is offloaded to NVMe.
        reduce_bucket_size: elements of gradients that are averaged at once; by default all of the model, up to 5e8.
        allgather_bucket_size: elements of parameters that are gathered at once; DeepSpeed's default is 5e8.
        overlap_comm: average gradients during backward (from stage 2 on); by default DeepSpeed decides.
        param_persistence_threshold: parameters of fewer elements are not sharded (stage 3).
        prefetch_bucket_size: elements that are gathered ahead (stage 3).
        sub_group_size: elements that are updated at once (stage 3).
        zero_hpz_partition_size: ranks of a group that holds a second copy of the parameters (stage 3).
        config: DeepSpeed's own configuration, a mapping or a JSON file, merged over all that.
        shared_memory_op: on a CPU, compile DeepSpeed's own communication between processes of one host. Only its
            inference uses it; needs ninja and a C++ compiler.
        build_timeout_s: seconds to wait for another process that compiles.
    """

    def __init__(
        self,
        *,
        stage: int = 2,
        offload_optimizer: str | None = None,
        offload_params: str | None = None,
        nvme_path: str | Path | None = None,
        reduce_bucket_size: int | None = None,
        allgather_bucket_size: int | None = None,
        overlap_comm: bool | None = None,
        param_persistence_threshold: int | None = None,
        prefetch_bucket_size: int | None = None,
        sub_group_size: int | None = None,
        zero_hpz_partition_size: int | None = None,
        config: Mapping[str, Any] | str | Path | None = None,
        shared_memory_op: bool = False,
        build_timeout_s: float = 600.0,
    ) -> None:
        self.options = configs.Options(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_params=offload_params,
            nvme_path=None if nvme_path is None else str(nvme_path),
            reduce_bucket_size=reduce_bucket_size,
            allgather_bucket_size=allgather_bucket_size,
            overlap_comm=overlap_comm,
            param_persistence_threshold=param_persistence_threshold,
            prefetch_bucket_size=prefetch_bucket_size,
            sub_group_size=sub_group_size,
            zero_hpz_partition_size=zero_hpz_partition_size,
        )
        plugin.validate(
            self, **asdict(self.options), shared_memory_op=shared_memory_op, build_timeout_s=build_timeout_s
        )
        self.options.check()
        self.shared_memory_op = shared_memory_op
        self.build_timeout_s = build_timeout_s
        super().__init__(configs.read_raw(config))

    @hookimpl
    def strategy_describe(self) -> Sequence[str]:
        """Return DeepSpeed's configuration, as far as it is known, a line per key."""
        return configs.lines(self._config or configs.final_config(self.options, self._raw, None))

    # ------------------------------------------------------------------ the loop

    @hookimpl
    def strategy_backward(
        self, loss: Tensor, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        for slot in self._slots:
            slot.before_backward(loss)
            self._hook_check.look(slot.module.named_parameters)
        scale = self._loss_scale
        (loss if scale == 1.0 else loss * scale).backward(*args, **kwargs)  # type: ignore[no-untyped-call]
        for slot in self._slots:
            slot.after_backward()

    @property
    def _loss_scale(self) -> float:
        return self._engines[0].zero.loss_scale if self._is_fp16 and self._engines else 1.0

    @hookimpl
    def strategy_no_sync(self, module: nn.Module, engine: AnyEngine, enabled: bool) -> AbstractContextManager[Any]:
        return ExitStack() if engine is None else _synchronizing(engine, not enabled)

    @hookimpl
    def strategy_optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        engine = self._engine_of(optimizer)
        if engine is None:
            return super().strategy_optimizer_step(optimizer, step, closure)
        if closure is not None:
            raise UnsupportedError(
                f"{type(optimizer).__name__}.step() was given a closure, which DeepSpeed cannot run: compute the loss "
                "before, and call step() without one; or use strategy='ddp'."
            )
        applied = engine.step()
        if not applied and not self._is_fp16 and self.context.world.global_rank == 0:
            warn_caller(f"Gradients were not finite, and DeepSpeed left this step of {type(optimizer).__name__} out.")
        self._sync_buffers(engine)
        return None

    @hookimpl
    def strategy_skip_step(self, optimizer: Optimizer) -> None:
        engine = self._engine_of(optimizer)
        if engine is None:
            super().strategy_skip_step(optimizer)
        else:
            self._update_scale(engine)
            engine.step(skips=True)
            self._sync_buffers(engine)

    def _update_scale(self, engine: Engine) -> None:
        """Let the loss scale learn of an overflow in a step that is not made."""
        if self._is_fp16 and not getattr(engine.zero, "swaps", False):
            engine.finish()
            if engine.pending:
                largest = self.strategy_clip_gradients(engine.module, (), None, math.inf, math.inf, False)
                scaled: Any = engine.zero
                scaled.zero.loss_scaler.update_scale(largest is None or not bool(largest.isfinite()))

    def _sync_buffers(self, engine: Engine) -> None:
        """Broadcast rank 0's buffers (running statistics), so that all ranks evaluate the same model."""
        if engine.stale_buffers and self.context.world.world_size > 1:
            sync_buffers(engine.module, self.context.hooks)
        engine.stale_buffers = False

    @hookimpl
    def strategy_zero_grad(self, owner: nn.Module | Optimizer) -> None:
        for engine in self._engines:
            if engine.module is owner or engine.borrowed.optimizer is owner:
                engine.clear()

    @hookimpl
    def strategy_next_batch(self, iterator: Any, exhausted: Any) -> Any:
        batch = next(iterator, exhausted)
        if batch is exhausted and any(slot.shards for slot in self._slots) and not self._training():
            self._evaluation.keep()
        return batch

    def _training(self) -> bool:
        return torch.is_grad_enabled() and any(slot.module.training for slot in self._slots)

    @hookimpl
    def strategy_scale_gradients(self, module: nn.Module, factor: float) -> None:
        engine = next((each for each in self._engines if each.module is module), None)
        if engine is None:
            super().strategy_scale_gradients(module, factor)
            return
        if getattr(engine.zero, "swaps", False):
            raise UnsupportedError(
                "lite.backward(loss, weight=…) in lite.accumulate() cannot reach gradients on NVMe: count before, with "
                "lite.accumulate(..., weight=function of the batch)."
            )
        engine.finish()
        for gradient in engine.zero.gradients() if engine.pending else ():
            gradient.mul_(factor)

    @hookimpl
    def strategy_clip_gradients(
        self,
        module: nn.Module,
        parameters: Sequence[Tensor],
        clip_value: float | None,
        max_norm: float | None,
        norm_type: float,
        error_if_nonfinite: bool,
    ) -> Tensor | None:
        engine = next((each for each in self._engines if each.module is module), None)
        if engine is None:
            return super().strategy_clip_gradients(
                module, parameters, clip_value, max_norm, norm_type, error_if_nonfinite
            )
        if getattr(engine.zero, "swaps", False):
            raise UnsupportedError(
                "lite.clip_gradients() cannot reach gradients on NVMe: use "
                "DeepSpeed(..., config={'gradient_clipping': 1.0})."
            )
        engine.finish()
        gradients = engine.zero.gradients() if engine.pending else []
        if clip_value is not None:
            clip_by_value(gradients, clip_value, engine.zero.loss_scale)
            return None
        assert max_norm is not None
        return clip_by_norm(
            gradients,
            max_norm,
            norm_type,
            scale=engine.zero.loss_scale,
            error_if_nonfinite=error_if_nonfinite,
            reduce=self._reduce if engine.zero.partitioned else None,
            device=self.context.device,
        )

    # ------------------------------------------------------------------ state

    @hookimpl
    def strategy_module_state(self, module: nn.Module, sharded: bool) -> dict[str, Any]:
        engine = next((each for each in self._engines if each.module is module), None)
        if engine is None:
            return super().strategy_module_state(module, sharded)
        return module_state(module, engine, self._keep(sharded), sharded=sharded)

    @hookimpl
    def strategy_load_module_state(
        self, module: nn.Module, state: dict[str, Any], strict: bool
    ) -> tuple[list[str], list[str]]:
        engine = next((each for each in self._engines if each.module is module), None)
        if engine is None:
            return super().strategy_load_module_state(module, state, strict)
        return load_module_state(module, engine, state)

    @hookimpl
    def strategy_optimizer_state(self, optimizer: Optimizer, sharded: bool) -> dict[str, Any]:
        engine = self._engine_of(optimizer)
        if engine is None:
            return super().strategy_optimizer_state(optimizer, sharded)
        return optimizer_state(engine, self._keep(sharded))

    @hookimpl
    def strategy_load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        engine = self._engine_of(optimizer)
        if engine is None:
            super().strategy_load_optimizer_state(optimizer, state)
        else:
            load_optimizer_state(engine, state)

    # ------------------------------------------------------------------ DeepSpeed's own

    def gradients(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the full averaged gradients of the module's trained parameters, by name. Every rank must call it."""
        engine = self._driven(module, "gradients")
        engine.finish()
        found = {}
        with engine.guard.opened(), engine.borrowed.lent():
            for name, parameter in module.named_parameters():
                if engine.pending and engine.fragments.get(parameter) is not None:
                    gradient = library("utils").safe_get_full_grad(parameter)
                    found[name] = gradient / engine.zero.loss_scale
        return found

    @contextmanager
    def gathered(self, module: nn.Module, *, write: bool = False) -> Iterator[None]:
        """Gather a module's parameters for a ``with`` block (stage 3). Every rank must call it.

        Args:
            write: whether the block changes values in place: rank 0's are then kept, on all ranks and in the
                optimizer's weights. Otherwise changes are lost.

        Raises:
            UnsupportedError: for `write`, if the optimizer's weights are on a disk.
        """
        slot = next((slot for slot in self._slots if slot.module is module), None)
        sharded: list[Any] = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
        if slot is None or slot.guard is None or not sharded:
            yield
            return
        if write and slot.engine is not None and getattr(slot.engine.zero, "swaps", False):
            raise UnsupportedError(
                "lite.strategy.gathered(model, write=True) cannot reach weights on NVMe: use lite.load()."
            )
        for parameter in sharded:
            parameter.ds_active_sub_modules.clear()  # an aborted forward leaves it in use
        whole = library("runtime.zero").GatheredParameters(sharded, modifier_rank=0 if write else None)
        with slot.guard.opened(), whole:
            yield

    def save_native(self, path: str | Path, module: nn.Module, *, tag: str | None = None) -> None:
        """Write the module and its optimizer in DeepSpeed's own format into a folder. Every rank must call it.

        It loads only on the same number of ranks in the same stage; ``lite.save`` has no such limits.
        """
        engine = self._driven(module, "save_native")
        with engine.guard.opened(), engine.borrowed.lent():
            engine.deepspeed.save_checkpoint(str(path), tag=tag)

    def load_native(self, path: str | Path, module: nn.Module, *, tag: str | None = None) -> None:
        """Read a checkpoint of `save_native`, by default the last. Every rank must call it.

        DeepSpeed unpickles it, which can run any code: read only files you trust.

        Raises:
            CheckpointError: if there is none.
        """
        engine = self._driven(module, "load_native")
        with engine.guard.opened(), engine.borrowed.lent():
            found, _ = engine.deepspeed.load_checkpoint(str(path), tag=tag)
        if found is None:
            raise CheckpointError(f"{path} holds no checkpoint of DeepSpeed{f' with tag {tag!r}' if tag else ''}.")

    def _driven(self, module: nn.Module, call: str) -> Engine:
        engine = next((each for each in self._engines if each.module is module), None)
        if engine is None:
            raise OrderError(f"{call}() takes a module that was set up with an optimizer: call lite.setup() first.")
        return engine

    def _keep(self, sharded: bool) -> Any:
        world = self.context.world
        if sharded and self._mesh is None:
            self._mesh = init_device_mesh(self.context.device.type, (world.world_size,), mesh_dim_names=("shard",))
        return make_keep(self._mesh if sharded else None, world.global_rank)


@contextmanager
def _synchronizing(slot: Slot, enabled: bool) -> Iterator[None]:
    before, slot.averages = slot.averages, enabled
    try:
        yield
    finally:
        slot.averages = before
