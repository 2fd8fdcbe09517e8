"""Fully sharded data parallelism over ``torch.distributed.fsdp.fully_shard`` (FSDP2)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.optim import Optimizer

from plugframe.base import Strategy, overwrite, stored
from plugframe.deferred.module import deferring, records
from plugframe.errors import SettingError, UnsupportedError
from plugframe.hooks import Engine as AnyEngine
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe.hooks.option import validate_options
from plugframe.utils.logging import warn_caller
from plugframe_builtins._shared.fully_shard.activation_checkpointing import recompute, without_cache
from plugframe_builtins._shared.fully_shard.added_parameters import AddedParameters
from plugframe_builtins._shared.fully_shard.engine import Engine, Shim, show_outputs
from plugframe_builtins._shared.fully_shard.partners import partners_parameters, with_partners, without_partners
from plugframe_builtins._shared.fully_shard.policy import check_policy, check_switches, make_policy
from plugframe_builtins._shared.fully_shard.unit_order import Channel
from plugframe_builtins._shared.fully_shard.units import (
    Units,
    check_units,
    find_units,
    keeps_statistics,
    prefetch,
    split_dtypes,
)
from plugframe_builtins._shared.generation import keep_in_step
from plugframe_builtins._shared.model_check import check_same_model
from plugframe_builtins._shared.sharding.clip import clip_by_norm, clip_by_value
from plugframe_builtins._shared.sharding.copies import allow_copies, keep_attributes
from plugframe_builtins._shared.sharding.layout import check_layout, check_plain, make_contiguous
from plugframe_builtins._shared.sharding.materialization import materialize_shards
from plugframe_builtins._shared.sharding.mesh import averaged_axes, check_mesh, make_mesh
from plugframe_builtins._shared.sharding.optimizer_remapping import OptimizerRemapping
from plugframe_builtins._shared.sharding.options import OPTIONS
from plugframe_builtins._shared.sharding.parameter import as_sharded
from plugframe_builtins._shared.sharding.plain_states import accept_plain_states
from plugframe_builtins._shared.sharding.state import full_state, load_module_state, load_optimizer_state
from plugframe_builtins._shared.sharding.uneven_evaluation import UnevenEvaluation


class FullyShardedStrategy(Strategy):
    """Shard parameters, gradients and optimizer state with ``fully_shard``; subclasses set the name and mesh axes.

    Attributes:
        name: the strategy's name, for messages.
        axes: the mesh axes, in order.
        graph_remedy: what to do for gradients with ``create_graph=True``, where parameters are resharded before.
    """

    name: str
    axes: tuple[str, ...]
    graph_remedy = "set reshard_after_forward=False, which keeps them until lite.backward() has ended"

    def __init__(
        self,
        *,
        units: Units = "auto",
        unit_min_numel: int = 100_000_000,
        reshard_after_forward: bool | int | None = None,
        mp_policy: MixedPrecisionPolicy | Mapping[str, Any] | None = None,
        cpu_offload: bool = False,
        mesh: Mapping[str, int] | None = None,
        activation_checkpointing: bool | Units = False,
        prefetch: int | None = None,
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        check_units(units)
        check_policy(mp_policy)
        check_mesh(self.name, mesh, self.axes)
        if not isinstance(activation_checkpointing, bool):
            check_units(activation_checkpointing)
        validate_options(self, OPTIONS, unit_min_numel=unit_min_numel, cpu_offload=cpu_offload, prefetch=prefetch)
        check_switches(self.name, reshard_after_forward, compile)
        self.units = units
        self.unit_min_numel = unit_min_numel
        self.reshard_after_forward = reshard_after_forward
        self.mp_policy = mp_policy
        self.cpu_offload = cpu_offload
        self.mesh = dict(mesh) if mesh else None
        self.activation_checkpointing = activation_checkpointing
        self.prefetch = prefetch
        self.compile = compile
        self._mesh: DeviceMesh | None = None
        self._remapping = OptimizerRemapping()
        self._engines: list[weakref.ref[Engine]] = []
        self._additions = AddedParameters()
        self._channel: Channel | None = None
        self._together: Sequence[Optimizer] = ()
        self._undo = ExitStack()

    @hookimpl
    def strategy_setup(self, context: Context) -> None:
        super().strategy_setup(context)
        if context.hooks.collective_process_group() is None:
            raise UnsupportedError(
                f"strategy {self.name!r} needs a process group, and collective {context.names.get('collective')!r} has "
                "none: use collective='torch'."
            )
        if self.cpu_offload and context.device.type == "cpu":
            raise UnsupportedError(
                f"cpu_offload=True of strategy {self.name!r} moves a model from an accelerator to the host, and the "
                "device is the CPU already: leave it out."
            )
        self._mesh = self._make_mesh(context) if context.mesh is None else self._own_mesh(context.mesh)
        self._evaluation = UnevenEvaluation(context.hooks, context.world.world_size)
        self._channel = Channel(context)

    def _make_mesh(self, context: Context) -> DeviceMesh:
        mesh = self.mesh or {"shard": -1}
        axes = tuple(axis for axis in self.axes if axis in mesh)
        return make_mesh(self.name, mesh, axes, context)

    def _own_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """Return the part of the job's mesh over which parameters are replicated and sharded."""
        if self.mesh is not None:
            raise SettingError(
                f"mesh={self.mesh!r} of strategy {self.name!r}, and mesh= of the job: leave the strategy's out."
            )
        # torch averages over the outer dimension and shards along the inner one.
        return mesh[averaged_axes(self.name, mesh, self.context) or self.context.axes[-1:]]

    @hookimpl
    def strategy_teardown(self) -> None:
        self._mesh = None
        for engine in self._alive():
            engine.close()
        self._engines.clear()
        self._additions.close()
        if self._channel is not None:
            self._channel.close()
        self._undo.close()

    @hookimpl
    def strategy_init_context(self, empty_init: bool | None) -> AbstractContextManager[Any]:
        return self.context.device if empty_init is False else deferring(self.context.device)

    @hookimpl
    def strategy_setup_module(self, module: nn.Module) -> AnyEngine:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        if not parameters:
            module.to(self.context.device)
            return None
        check_plain(module, parameters, self.name)
        check_layout(module, parameters, self.name)
        values = records(module)
        check_same_model(module, self.context.hooks, values)
        make_contiguous(module)
        for tensor in dict.fromkeys((*module.parameters(), *module.buffers())):
            if not tensor.is_meta:
                self._broadcast(tensor)
        self._parallelize(module)
        units = self._find_units(module)
        self._prepare_units(module, units)
        units = self._with_statistics(module, units)
        shim = self._shard(module, units)
        materialize_shards(module, values, device=self._home, broadcast=self._broadcast)
        after = dict(module.named_parameters(remove_duplicate=False))
        for parameter in after.values():
            as_sharded(parameter)
        self._remapping.note(parameters, after, self._together)
        keep_attributes(module)
        allow_copies(module, units)
        accept_plain_states(module, self.context.hooks)
        assert self._channel is not None
        remedy = self.graph_remedy if self.reshard_after_forward is not False else None
        keep_in_step(module, self._undo)
        parts = with_partners(module, units[::-1])
        engine = Engine(shim, parts, self._evaluation, self._channel, self.name, remedy)
        self._engines = [reference for reference in self._engines if reference() is not None]
        self._engines.append(weakref.ref(engine))
        self._additions.watch(module, engine)
        return engine

    def _parallelize(self, module: nn.Module) -> None:
        """Apply parallelism over further mesh axes before the module is sharded over the data axis."""
        if self.context.parallelize is not None:
            self.context.parallelize(module)

    def _find_units(self, module: nn.Module) -> list[nn.Module]:
        units = find_units(module, self.units, min_numel=self.unit_min_numel)
        more = split_dtypes(module, units)
        order = {id(part): number for number, part in enumerate(module.modules())}
        # Inner ones first, as fully_shard requires.
        return sorted(without_partners(module, [*units, *more]), key=lambda part: -order[id(part)])

    def _with_statistics(self, module: nn.Module, units: list[nn.Module]) -> list[nn.Module]:
        """Return the units, preceded by norms whose parameters must keep the dtype of their running statistics."""
        if self._policy().param_dtype is None:
            return units
        known = set(map(id, units))
        return [*(part for part in keeps_statistics(module) if id(part) not in known), *units]

    def _policy(self) -> MixedPrecisionPolicy:
        return make_policy(self.mp_policy, self.context.hooks.precision_dtypes())

    def _prepare_units(self, module: nn.Module, units: Sequence[nn.Module]) -> None:
        choice = self.activation_checkpointing
        if choice is not False:
            blocks = units if choice is True else find_units(module, choice, min_numel=self.unit_min_numel)
            if not blocks and self.context.world.global_rank == 0:
                warn_caller(
                    f"activation_checkpointing={choice!r} finds no block in this {type(module).__name__}: name the "
                    "classes of its blocks."
                )
            self._undo.callback(recompute(blocks))
            self._undo.callback(without_cache(module))
        if self.compile is not False:
            for unit in units:
                unit.compile(**({} if self.compile is True else self.compile))

    def _shard(self, module: nn.Module, units: Sequence[nn.Module]) -> Shim:
        policy = self._policy()
        offload = CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy()
        options: dict[str, Any] = {"mesh": self._data_mesh, "mp_policy": policy, "offload_policy": offload}
        options["ignored_params"] = partners_parameters(module)
        reshards = self._reshards_after_forward()
        if reshards is not None:
            options["reshard_after_forward"] = reshards
        whole_dtype = {**options, "mp_policy": replace(policy, param_dtype=None, cast_forward_inputs=False)}
        norms = set(map(id, keeps_statistics(module)))
        for unit in units:
            show_outputs(unit)
            fully_shard(unit, **(whole_dtype if id(unit) in norms else options))
        shim = Shim(module)
        fully_shard(shim, **options)
        if self.prefetch is not None:
            prefetch(units[::-1], self.prefetch)
        return shim

    def _reshards_after_forward(self) -> bool | int | None:
        """Return torch's option; None for torch's default, all units but the outermost.

        Beside another strategy the outermost unit is resharded too: a gathered parameter is a torch DTensor then, not a
        plain tensor, and terms over parameters outside of a forward (an L2 penalty) would mix the two.
        """
        if self.reshard_after_forward is None and self.context.parallelize is not None:
            return True
        return self.reshard_after_forward

    @property
    def _data_mesh(self) -> DeviceMesh:
        assert self._mesh is not None
        return self._mesh

    @property
    def _home(self) -> torch.device:
        return torch.device("cpu") if self.cpu_offload else self.context.device

    @torch.no_grad()
    def _broadcast(self, tensor: Tensor) -> None:
        """Broadcast rank 0's values."""
        if self.context.world.world_size > 1:
            own = stored(tensor.detach())
            overwrite(own, self.context.hooks.collective_broadcast(tensor=own, src=0, group=None))

    @hookimpl
    def strategy_setup_optimizers(
        self, module: nn.Module | None, optimizers: Sequence[Optimizer]
    ) -> Sequence[Optimizer]:
        self._remapping.carry_over(optimizers)
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

    # ------------------------------------------------------------------ the loop

    @hookimpl
    def strategy_next_batch(self, iterator: Any, exhausted: Any) -> Any:
        batch = next(iterator, exhausted)
        if batch is exhausted and not self._training():
            self._evaluation.keep()
        return batch

    def _training(self) -> bool:
        return torch.is_grad_enabled() and any(engine.shim.module.training for engine in self._alive())

    @hookimpl
    def strategy_backward(
        self, loss: Tensor, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        with ExitStack() as stack:
            for engine in self._alive():
                stack.enter_context(engine.backward())
            super().strategy_backward(loss, module, args, kwargs)

    @hookimpl
    def strategy_no_sync(self, module: nn.Module, engine: AnyEngine, enabled: bool) -> AbstractContextManager[Any]:
        if engine is None or self.context.world.world_size == 1:  # there is no communication to skip
            return nullcontext()
        return engine.averaging.switched(not enabled)  # type: ignore[no-any-return]

    @hookimpl
    def strategy_optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        for engine in self._alive():
            engine.before_step()
            if engine.local and engine.owns(optimizer):
                engine.local = False
                self._warn_local(optimizer)
        result = super().strategy_optimizer_step(optimizer, step, closure)
        for engine in self._alive():
            if engine.stale_buffers and engine.owns(optimizer):
                engine.sync_buffers(self.context.hooks)
        return result

    def _warn_kept(self) -> None:
        dtypes = self.context.hooks.precision_dtypes()
        if make_policy(self.mp_policy, dtypes).reduce_dtype is not None and self.context.world.global_rank == 0:
            warn_caller(
                "zero_grad() cannot drop gradients that were accumulated under no_backward_sync() and never averaged "
                f"in precision={self.context.names['precision']!r}: torch keeps them apart until they are reduced. Run "
                "the last backward outside of it before."
            )

    def _warn_local(self, optimizer: Optimizer) -> None:
        if self.context.world.global_rank == 0:
            warn_caller(
                f"{type(optimizer).__name__}.step() leaves out gradients accumulated under no_backward_sync() "
                "and never averaged: they wait for a backward outside of it. Run the last backward so."
            )

    @hookimpl
    def strategy_zero_grad(self, owner: nn.Module | Optimizer) -> None:
        for engine in self._alive():
            if engine.zero_grad(owner):
                self._warn_kept()

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
        if clip_value is not None:
            clip_by_value(parameters, clip_value)
            return None
        assert max_norm is not None
        return clip_by_norm(parameters, max_norm, norm_type, error_if_nonfinite, self.context)

    # ------------------------------------------------------------------ state

    @hookimpl
    def strategy_module_state(self, module: nn.Module, sharded: bool) -> dict[str, Any]:
        self._reshard()
        state = module.state_dict()
        return state if sharded else full_state(state, keep=self.context.world.global_rank == 0)

    @hookimpl
    def strategy_load_module_state(
        self, module: nn.Module, state: dict[str, Any], strict: bool
    ) -> tuple[list[str], list[str]]:
        self._reshard()
        return load_module_state(module, module.state_dict(), state)

    @hookimpl
    def strategy_optimizer_state(self, optimizer: Optimizer, sharded: bool) -> dict[str, Any]:
        self._reshard()
        state = optimizer.state_dict()
        return state if sharded else full_state(state, keep=self.context.world.global_rank == 0)

    @hookimpl
    def strategy_load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        self._reshard()
        load_optimizer_state(optimizer, state)

    def _reshard(self) -> None:
        for engine in self._alive():
            engine.reshard()

    def _alive(self) -> Iterable[Engine]:
        return [engine for engine in (reference() for reference in self._engines) if engine is not None]
