"""Pipeline parallelism with ``torch.distributed.pipelining``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.base import Strategy
from plugframe.deferred.module import deferring, materialize_module
from plugframe.errors import SettingError, UnsupportedError
from plugframe.hooks import Engine as AnyEngine
from plugframe.hooks import Plugin, hookimpl
from plugframe.hooks.context import Context
from plugframe.utils.logging import warn_caller
from plugframe_builtins._shared.broadcast import broadcast_from_first
from plugframe_builtins._shared.fully_shard.added_parameters import AddedParameters
from plugframe_builtins._shared.fully_shard.part_sharding import find_parts, shard_parts
from plugframe_builtins._shared.fully_shard.partners import find_partners
from plugframe_builtins._shared.fully_shard.parts import ShardedParts
from plugframe_builtins._shared.fully_shard.strategy import FullyShardedStrategy
from plugframe_builtins._shared.model_check import check_same_model
from plugframe_builtins._shared.sharding.clip import clip_by_norm as clip_shards_by_norm
from plugframe_builtins._shared.sharding.clip import clip_by_value
from plugframe_builtins.pipeline import plugin
from plugframe_builtins.pipeline.axis import NAME, Axis, make_axis, whole_world
from plugframe_builtins.pipeline.checks import check_module
from plugframe_builtins.pipeline.clip import clip_by_norm
from plugframe_builtins.pipeline.cut import ATTRIBUTE, Cut, Split, buffers_of, check_split, make_cut
from plugframe_builtins.pipeline.engine import Engine
from plugframe_builtins.pipeline.equal_calls import EqualCalls
from plugframe_builtins.pipeline.optimizers import own_parameters, split_optimizer
from plugframe_builtins.pipeline.replicas import Replicas
from plugframe_builtins.pipeline.schedules import check_name, is_class, misfit
from plugframe_builtins.pipeline.sharding import parallelize_stages, sharding_base
from plugframe_builtins.pipeline.stand_in import Backwards, OtherParameter, OtherStage, give_up, stand_in
from plugframe_builtins.pipeline.state import (
    Layout,
    Place,
    load_module_state,
    load_optimizer_state,
    module_state,
    optimizer_state,
)


class Pipeline(Strategy):
    """Cut the model into stages, one rank (or several stages a rank) each, and send micro-batches through them.

    The model stays the user's object with all its names; the parameters of other stages hold no values on this rank.
    Every rank reads the same batches and gets the same loss or outputs. A model that returns its loss runs the complete
    schedule, forward and backward, in the call; ``lite.backward(loss)`` scales the gradients and adds them.

    Args:
        stages: number of stages; by default one per rank. More than ranks for `interleaved` and `zero_bubble`.
        split: where to cut: paths of the modules that start a new stage (``["layers.4"]``), or the modules of every
            stage as lists of patterns. By default the model's attribute ``pipeline_plan``, else balanced by
            parameters between the blocks of its largest container.
        schedule: ``"gpipe"``, ``"1f1b"``, ``"interleaved"`` or ``"zero_bubble"``, or ``"package.module:Class"``, a
            subclass of torch's ``PipelineScheduleSingle`` or ``PipelineScheduleMulti``. By default 1f1b if the model
            returns its loss, else gpipe, the only one for models that return outputs.
        micro_batches: micro-batches of a batch, at most; by default as many as stages. A batch that they do not
            divide is cut into fewer.
    """

    def __init__(
        self,
        *,
        stages: int | None = None,
        split: Split | None = None,
        schedule: str | None = None,
        micro_batches: int | None = None,
    ) -> None:
        plugin.validate(self, stages=stages, schedule=schedule, micro_batches=micro_batches)
        if schedule is not None:
            check_name(schedule)
        if split is not None:
            check_split(split, "split= of strategy 'pipeline'")
        self.stages = stages
        self.split = split
        self.schedule = schedule
        self.micro_batches = micro_batches
        self._axis: Axis | None = None
        self._layout: Layout | None = None
        self._engines: list[weakref.ref[Engine]] = []
        self._additions = AddedParameters()
        self._replicas: Replicas | None = None
        self._led: Plugin | None = None
        self._base: FullyShardedStrategy | None = None
        self._together: Sequence[Optimizer] = ()

    @hookimpl
    def strategy_setup(self, context: Context) -> None:
        super().strategy_setup(context)
        group = context.hooks.collective_process_group()
        if group is None:
            raise UnsupportedError(
                f"strategy 'pipeline' needs a process group, and collective {context.names.get('collective')!r} has "
                "none: use collective='torch'."
            )
        if self._led is not None and ("sharded" in self._led.provides or context.parallelize is not None):
            self._base = sharding_base(context)
        self._use(self._make_axis(context))

    def _make_axis(self, context: Context) -> Axis:
        """Return the ranks of this rank's pipeline, which are not all ranks of the job where there are replicas."""
        mesh = context.mesh
        if mesh is None:
            return whole_world(context)
        if self._base is not None:
            return make_axis(context, mesh, NAME)
        data = mesh["data"]
        if data.size() > 1:
            self._replicas = Replicas(data.get_group(), data.size(), context.hooks)
        return make_axis(context, mesh, NAME, (data.get_local_rank(), data.size()))

    @hookimpl
    def strategy_lead(self, base: Plugin) -> bool:
        self._led = base
        return True

    def _use(self, axis: Axis) -> None:
        self._axis, self._layout = axis, Layout(axis)
        if axis.size == 1:
            return
        stages = self.stages or axis.size
        micro_batches = self.micro_batches or stages
        problem = misfit(self.schedule or "gpipe", stages=stages, ranks=axis.size, micro_batches=micro_batches)
        if problem is not None:
            schedule = f"schedule={self.schedule!r}" if self.schedule else "the schedule"
            raise SettingError(f"{schedule} of strategy 'pipeline' does not fit: {problem}.")

    @hookimpl
    def strategy_teardown(self) -> None:
        self._axis = self._layout = self._replicas = None
        base, self._base = self._base, None
        if base is not None:
            base.strategy_teardown()
        self._engines.clear()
        self._additions.close()

    @hookimpl
    def strategy_init_context(self, empty_init: bool | None) -> AbstractContextManager[Any]:
        return self.context.device if empty_init is False else deferring(self.context.device)

    # ------------------------------------------------------------------ set-up

    @hookimpl
    def strategy_setup_module(self, module: nn.Module) -> AnyEngine:
        axis = self._on
        if (axis.size == 1 and self._base is None) or next(module.parameters(), None) is None:
            materialize_module(module, self.context.device)
            return None
        check_module(module)
        check_same_model(module, self.context.hooks)
        before = dict(module.named_parameters(remove_duplicate=False))
        found = None if self._base is None else find_parts(self._base, module)
        cut, backwards = self._cut(module, axis), Backwards()
        self._distribute(module, cut, backwards)
        places, parts, skipped, replicas = _places(module, cut, axis), None, {}, None
        if self._base is not None and found is not None:
            skipped = parallelize_stages(module, cut, axis, self.context.parallelize)
            partners = find_partners(module)
            replicas = self._equal_calls([partner.path for partner in partners], axis)
            apart = {holder for partner in partners for holder in partner.holders}
            own = list(dict.fromkeys(part for part, _, _ in places if part not in apart))
            parts = shard_parts(self._base, module, own, found, before, self._together)
            parts.alike = replicas is not None
        micro_batches = self.micro_batches or cut.num_stages
        engine = Engine(module, cut, axis, places, self.schedule, micro_batches, backwards, parts, skipped, replicas)
        self._additions.watch(module, engine)
        self._engines = [weakref.ref(each) for each in (*self._alive(), engine)]
        return engine

    def _equal_calls(self, paths: list[str], axis: Axis) -> EqualCalls | None:
        """Return None if no stage of the pipeline has parts that communicate."""
        if not any(axis.gather_objects(paths)):
            return None
        if self.schedule == "zero_bubble" or is_class(self.schedule):
            raise SettingError(
                f"schedule={self.schedule!r} of strategy 'pipeline' splits backwards, and divided experts exchange "
                "gradients within them: use 'gpipe', '1f1b' or 'interleaved'."
            )
        return EqualCalls(self.context.hooks, paths)

    def _cut(self, module: nn.Module, axis: Axis) -> Cut:
        if axis.size == 1:
            return make_cut(module, None, 1, "the balanced cut")
        split, where = self.split, "split= of strategy 'pipeline'"
        if split is None and hasattr(module, ATTRIBUTE):
            split, where = getattr(module, ATTRIBUTE), f"{type(module).__name__}.{ATTRIBUTE}"
            check_split(split, where)
        return make_cut(module, split, self.stages or axis.size, where if split is not None else "the balanced cut")

    def _alive(self) -> Iterator[Engine]:
        return (engine for engine in (reference() for reference in self._engines) if engine is not None)

    def _engine_of(self, module: nn.Module) -> Engine | None:
        return next((engine for engine in self._alive() if engine.module is module), None)

    @property
    def _on(self) -> Axis:
        assert self._axis is not None
        return self._axis

    @torch.no_grad()
    def _distribute(self, module: nn.Module, cut: Cut, backwards: Backwards) -> None:
        """Give every rank the first rank's values of its stages, and free the others, unit by unit."""
        done: set[int] = set()
        for path in (*cut.units, ""):
            part = module.get_submodule(path)
            materialize_module(part, self.context.device)
            prefix = f"{path}." * bool(path)
            named = [(prefix + name, p) for name, p in part.named_parameters() if id(p) not in done]
            buffers = {prefix + name: held for name, held in buffers_of(part).items() if id(held[2]) not in done}
            # From the first rank of the job, to all replicas of the pipeline.
            everyone = self.context.hooks.collective_process_group()
            broadcast_from_first([*(p for _, p in named), *(b for _, _, b in buffers.values())], everyone)
            done.update(id(p) for _, p in named)
            for name, parameter in named:
                if not self._owns(cut, name):
                    give_up(parameter, f"parameter {name!r} of stage {cut.owners[name]}", backwards)
            for name, (holder, leaf, buffer) in buffers.items():
                if not self._owns(cut, name):
                    origin = f"buffer {name!r} of stage {cut.owners[name]}"
                    holder._buffers[leaf] = buffer = stand_in(buffer, origin, buffer.device)
                done.add(id(buffer))

    def _owns(self, cut: Cut, name: str) -> bool:
        owner = cut.owners[name]
        return owner is None or owner % self._on.size == self._on.rank

    @hookimpl
    def strategy_setup_optimizers(
        self, module: nn.Module | None, optimizers: Sequence[Optimizer]
    ) -> Sequence[Optimizer]:
        if self._base is not None:
            self._base.strategy_setup_optimizers(module, optimizers)
        for optimizer in optimizers:
            split_optimizer(optimizer)
        return optimizers

    @hookimpl
    def strategy_setup_module_and_optimizers(
        self, module: nn.Module, optimizers: Sequence[Optimizer]
    ) -> tuple[AnyEngine, Sequence[Optimizer]]:
        self._together = optimizers
        try:
            return super().strategy_setup_module_and_optimizers(module, optimizers)
        finally:
            self._together = ()

    @hookimpl
    def strategy_optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        for parts in self._parts():
            if parts.local and parts.owns(optimizer):
                parts.local = False
                if self.context.world.global_rank == 0:
                    warn_caller(
                        f"{type(optimizer).__name__}.step() leaves out gradients accumulated under no_backward_sync() "
                        "and never averaged: they wait for a backward outside of it. Run the last backward so."
                    )
        if self._replicas is not None and self._replicas.local:
            self._replicas.local = False
            if self.context.world.global_rank == 0:
                warn_caller(
                    f"{type(optimizer).__name__}.step() uses gradients that were accumulated under no_backward_sync() "
                    "and never averaged: the replicas diverge. Run the last backward before a step outside of it."
                )
        with own_parameters(optimizer):
            return super().strategy_optimizer_step(optimizer, step, closure)

    @hookimpl
    def strategy_data_shard(self) -> tuple[int, int]:
        return self._on.data_shard

    # ------------------------------------------------------------------ the loop

    def _parts(self) -> Iterator[ShardedParts]:
        return (engine.parts for engine in self._alive() if engine.parts is not None)

    @hookimpl
    def strategy_next_batch(self, iterator: Any, exhausted: Any) -> Any:
        batch = next(iterator, exhausted)
        if batch is exhausted and self._base is not None:
            training = torch.is_grad_enabled() and any(engine.module.training for engine in self._alive())
            if not training:
                self._base._evaluation.keep()
        return batch

    @hookimpl
    def strategy_zero_grad(self, owner: nn.Module | Optimizer) -> None:
        for parts in self._parts():
            if parts.local and (parts.owns(owner) if isinstance(owner, Optimizer) else owner is parts.module):
                parts.forget()

    @hookimpl
    def strategy_backward(
        self, loss: Tensor, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if isinstance(loss, OtherStage):
            raise UnsupportedError(
                f"The loss depends on {loss.origin}, which this rank does not have: compute terms over parameters in "
                "the model's forward, on the last stage's modules, or use the optimizer's weight_decay."
            )
        with ExitStack() as stack:
            for parts in self._parts():
                stack.enter_context(parts.backward())
            super().strategy_backward(loss, module, args, kwargs)
        if self._replicas is not None:
            self._replicas.average(engine.module for engine in self._alive())

    @hookimpl
    def strategy_no_sync(self, module: nn.Module, engine: AnyEngine, enabled: bool) -> AbstractContextManager[Any]:
        if isinstance(engine, Engine) and engine.parts is not None:
            return engine.parts.averaging.switched(not enabled)
        return nullcontext() if self._replicas is None else self._replicas.averaging(not enabled)

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
        own = [p for p in parameters if not isinstance(p, OtherParameter) and p.grad is not None and p.numel()]
        if clip_value is not None:
            clip_by_value(own, clip_value)
            return None
        assert max_norm is not None
        if self._base is not None:
            return clip_shards_by_norm(own, max_norm, norm_type, error_if_nonfinite, self.context, self._on.size)
        staged = {id(p) for engine in self._alive() for p in engine.parameters()}
        return clip_by_norm(own, staged, self._on, max_norm, norm_type, error_if_nonfinite)

    # ------------------------------------------------------------------ state

    @hookimpl
    def strategy_module_state(self, module: nn.Module, sharded: bool) -> dict[str, Any]:
        engine = self._engine_of(module)
        if engine is None:
            return module.state_dict()
        return module_state(module, engine.cut.owners, self._on, self._place(sharded))

    @hookimpl
    def strategy_load_module_state(
        self, module: nn.Module, state: dict[str, Any], strict: bool
    ) -> tuple[list[str], list[str]]:
        engine = self._engine_of(module)
        if engine is None:
            missing: tuple[list[str], list[str]] = super().strategy_load_module_state(module, state, strict)
            return missing
        return load_module_state(module, engine.cut.owners, self._on, state)

    @hookimpl
    def strategy_optimizer_state(self, optimizer: Optimizer, sharded: bool) -> dict[str, Any]:
        if self._on.size == 1 and self._base is None:
            return optimizer.state_dict()
        return optimizer_state(optimizer, self._on, self._place(sharded))

    @hookimpl
    def strategy_load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        load_optimizer_state(optimizer, state)

    def _place(self, sharded: bool) -> Place:
        assert self._layout is not None
        return self._layout.shards() if sharded else self._layout.full(keep=self.context.world.global_rank == 0)


def _places(module: nn.Module, cut: Cut, axis: Axis) -> list[tuple[nn.Module, str, int]]:
    """Return the modules that hold parameters of this rank's stages, with the parameters' names and stages."""
    places = []
    for path, part in module.named_modules():
        for name in part._parameters:
            stage = cut.owners.get(f"{path}." * bool(path) + name)
            if stage is not None and stage % axis.size == axis.rank:
                places.append((part, name, stage))
    return places
