"""Set-up under DeepSpeed: the session, sharded modules, and their optimizers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from plugframe.base import Strategy, overwrite, stored
from plugframe.deferred.module import deferring, materialize_module
from plugframe.errors import UnsupportedError
from plugframe.hooks import Engine as AnyEngine
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe.utils.registrations import Registrations
from plugframe_builtins._shared.data_parallel.engine import Engine as Replica
from plugframe_builtins._shared.data_parallel.reducer import Backward
from plugframe_builtins._shared.generation import keep_in_step
from plugframe_builtins._shared.model_check import check_same_model
from plugframe_builtins._shared.sharding.uneven_evaluation import UnevenEvaluation
from plugframe_builtins._shared.tensor_hooks import TensorHookCheck
from plugframe_builtins.deepspeed import config as configs
from plugframe_builtins.deepspeed.agreement import Agreement
from plugframe_builtins.deepspeed.borrowed import Borrowed
from plugframe_builtins.deepspeed.engine import Engine, Reader
from plugframe_builtins.deepspeed.fragments import extent
from plugframe_builtins.deepspeed.guard import Guard
from plugframe_builtins.deepspeed.library import library
from plugframe_builtins.deepspeed.partition import has_deferred, partition, sent_already
from plugframe_builtins.deepspeed.rounding import Rounding
from plugframe_builtins.deepspeed.runtime import initialize, start
from plugframe_builtins.deepspeed.slot import Slot
from plugframe_builtins.deepspeed.state import load_optimizer_state
from plugframe_builtins.deepspeed.suitable import check_optimizer, check_parameters


class SetUp(Strategy):
    """The set-up and tear-down hooks of the strategy."""

    options: configs.Options
    shared_memory_op: bool
    build_timeout_s: float

    def __init__(self, raw: configs.Config) -> None:
        self._raw = raw
        self._config: configs.Config = {}
        self._evaluation: UnevenEvaluation
        self._mesh: DeviceMesh | None = None
        self._agreement: Agreement | None = None
        self._slots: list[Slot] = []
        self._registrations = Registrations()
        self._backward = Backward()
        self._undo = ExitStack()

    # ------------------------------------------------------------------ the job

    @hookimpl
    def strategy_setup(self, context: Context) -> None:
        super().strategy_setup(context)
        dtypes = context.hooks.precision_dtypes()
        self._config = configs.final_config(self.options, self._raw, dtypes, context.names["precision"])
        if context.hooks.collective_process_group() is None:
            raise UnsupportedError(
                f"strategy 'deepspeed' needs a process group, and collective {context.names.get('collective')!r} has "
                "none: use collective='torch'."
            )
        self._evaluation = UnevenEvaluation(context.hooks, context.world.world_size)
        self._undo = start(context, shared_memory_op=self.shared_memory_op, build_timeout_s=self.build_timeout_s)
        self._undo.callback(self._registrations.watch())
        world = context.world
        self._hook_check = TensorHookCheck(warns=world.world_size > 1 and world.global_rank == 0)
        # A simulated group has no peers.
        if self.stage > 1 and context.world.world_size > 1 and "gloo" in dist.get_backend_config(dist.group.WORLD):
            self._agreement = Agreement(context.world.world_size)
            self._undo.callback(self._agreement.close)
        self._check_device(context)

    def _check_device(self, context: Context) -> None:
        if self._is_fp16 and not library("accelerator").get_accelerator().is_fp16_supported():
            raise UnsupportedError(
                f"precision={context.names['precision']!r}: DeepSpeed does not train in float16 on this "
                f"{context.device.type}: use precision='bf16-mixed'."
            )
        offloads = self._config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
        if offloads and self._config.get("bf16", {}).get("bf16_master_weights_and_grads"):
            raise UnsupportedError(
                f"precision={context.names['precision']!r} does not go with an offloaded optimizer, whose weights are "
                "in float32: use precision='bf16-mixed'."
            )

    @hookimpl
    def strategy_teardown(self) -> None:
        with self._undo:
            for slot in self._slots:
                self._undo.callback(slot.close, alone=self.context.world.world_size == 1)
            self._slots.clear()
            self._mesh = self._agreement = None

    @property
    def stage(self) -> int:
        """The stage, from the plugin name, the option or the raw configuration."""
        return int((self._config or self._raw).get("zero_optimization", {}).get("stage", self.options.stage))

    @hookimpl
    def strategy_init_context(self, empty_init: bool | None) -> AbstractContextManager[Any]:
        if self.stage == 3 and empty_init is None:
            return deferring(self.context.device)
        return super().strategy_init_context(empty_init)

    # ------------------------------------------------------------------ modules and optimizers

    @hookimpl
    def strategy_setup_module(self, module: nn.Module) -> AnyEngine:
        if not any(True for _ in module.parameters()):
            return None
        check_same_model(module, self.context.hooks)
        refused = next((slot for slot in self._slots if slot.module is module), None)
        if refused is not None:  # its optimizers were refused earlier
            return refused
        slot = Slot(module, replicate=self._replicate, read=self._reader, announce=self._announce)
        self._slots.append(slot)
        if self.stage == 3:
            keep_in_step(module, self._undo)
        if self.stage == 3 and has_deferred(module):
            self._partition(slot)
        else:
            materialize_module(module, self.context.device)
            for tensor in (*module.parameters(), *module.buffers()):
                self._broadcast(tensor)
        return slot

    def _partition(self, slot: Slot) -> None:
        rounding = Rounding(slot.module, self._rounds_to)
        with slot.marks.watching():
            slot.pieces = partition(
                slot.module,
                self.context,
                self._config,
                dtype=self._rounds_to,
                broadcast=self._broadcast,
                rounding=rounding,
            )
        self._warn(rounding)
        slot.number = self._evaluation.join(slot)
        slot.watch(self.stage).lock()

    @torch.no_grad()
    def _broadcast(self, tensor: Tensor) -> None:
        """Broadcast rank 0's values."""
        if self.context.world.world_size > 1:
            own = stored(tensor.detach())
            overwrite(own, self.context.hooks.collective_broadcast(tensor=own, src=0, group=None))

    @property
    def _rounds_to(self) -> torch.dtype | None:
        """The dtype of parameters that DeepSpeed also keeps in float32; None if it keeps one copy."""
        dtypes = self.context.hooks.precision_dtypes()
        return None if dtypes.parameter is dtypes.compute else dtypes.compute

    def _warn(self, rounding: Rounding) -> None:
        if self.context.world.global_rank == 0:
            rounding.warn()

    def _reader(self, module: nn.Module, guard: Guard) -> Reader:
        return Reader(module, lambda shim: self._initialize(shim, None), guard, self._agreement)

    def _announce(self, slot: Slot) -> None:
        self._evaluation.announce(slot.number)

    def _replicate(self, module: nn.Module) -> Replica:
        group = self.context.hooks.collective_process_group()
        return Replica(
            module,
            group=group,
            check=functools.partial(check_same_model, hooks=self.context.hooks),
            registrations=self._registrations,
            backward=self._backward,
        )

    @hookimpl
    def strategy_setup_optimizers(
        self, module: nn.Module | None, optimizers: Sequence[Optimizer]
    ) -> Sequence[Optimizer]:
        slots = [slot for slot in self._slots if module is None or slot.module is module]
        owners = [self._owner(optimizer, slots) for optimizer in optimizers]
        pairs = [(slot, optimizer) for slot, optimizer in zip(owners, optimizers, strict=True) if slot is not None]
        # All are checked first: a refused call changes nothing.
        for slot, optimizer in pairs:
            if slot.engine is not None or owners.count(slot) > 1:
                raise UnsupportedError(
                    f"Strategy 'deepspeed' takes one optimizer for a model, and this {type(slot.module).__name__} has "
                    "more: make one optimizer with several parameter groups."
                )
            self._check(slot.module, optimizer)
        for slot, optimizer in pairs:
            self._drive(slot, optimizer)
        return optimizers

    def _owner(self, optimizer: Optimizer, slots: Sequence[Slot]) -> Slot | None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        owners = [slot for slot in slots if any(id(parameter) in held for parameter in slot.module.parameters())]
        if len(owners) > 1:
            names = ", ".join(type(slot.module).__name__ for slot in owners)
            raise UnsupportedError(
                f"This {type(optimizer).__name__} updates several models ({names}), and strategy 'deepspeed' takes an "
                "optimizer for each model: make several, or put the models into one."
            )
        return owners[0] if owners else None

    def _drive(self, slot: Slot, optimizer: Optimizer) -> None:
        module = slot.module
        if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
            return
        known = optimizer.state_dict() if optimizer.state else None
        if self.stage == 3 and slot.pieces is None:
            self._partition(slot)
        if slot.pieces is None:
            rounding = Rounding(module, self._rounds_to)
            for frozen in module.parameters():
                rounding.note(frozen)
            self._warn(rounding)
        values = slot.pieces if slot.pieces is not None else self._values_before(module)
        engine = slot.drive(lambda guard: self._engine(module, optimizer, guard), self.stage)
        for parameter in engine.fragments.parameters():
            if id(parameter) in values:
                engine.fragments.put(parameter, values[id(parameter)], full=slot.pieces is None)
        optimizer.state.clear()
        if known is not None:
            load_optimizer_state(engine, known)
        engine.zero.complete_values()
        engine.guard.lock()

    def _engine(self, module: nn.Module, optimizer: Optimizer, guard: Guard) -> Engine:
        return Engine(
            module,
            Borrowed(optimizer),
            initialize=self._initialize,
            add_up=self._add_up,
            guard=guard,
            agreement=self._agreement,
            registrations=self._registrations,
        )

    def _check(self, module: nn.Module, optimizer: Optimizer) -> None:
        check_parameters(module, self.stage)
        check_optimizer(optimizer, self.stage, self.context.world.world_size)
        if self._is_fp16 and self._engines:
            raise UnsupportedError(
                "Two models train, and in float16 DeepSpeed gives each a loss scale of its own, while "
                "a loss has one: use precision='bf16-mixed'."
            )

    def _values_before(self, module: nn.Module) -> dict[int, Tensor]:
        """Return copies of parameters that DeepSpeed would round before it copies them in float32."""
        if self._rounds_to is None:
            return {}
        parameters = (p for p in module.parameters() if p.requires_grad and p.dtype is torch.float32)
        return {id(parameter): parameter.detach().clone() for parameter in parameters}

    def _initialize(self, shim: nn.Module, optimizer: Optimizer | None) -> Any:
        config = configs.merged(self._config, {})
        numel = sum(extent(parameter)[0] for parameter in shim.parameters())
        # A buffer of this size is allocated in every backward.
        sizes = {"reduce_bucket_size": max(1, min(numel, 500_000_000))} if self.stage else {}
        config["zero_optimization"] = {**sizes, **config["zero_optimization"]}
        with sent_already(shim) if self.stage < 3 else nullcontext():
            return initialize(self.context, shim, optimizer, config)

    def _add_up(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, "sum")

    def _reduce(self, tensor: Tensor, op: Any) -> Tensor:
        if self.context.world.world_size == 1:
            return tensor
        reduced: Tensor = self.context.hooks.collective_all_reduce(tensor=tensor, op=op, group=None)
        return reduced

    @property
    def _is_fp16(self) -> bool:
        return bool(self._config.get("fp16", {}).get("enabled"))

    def _engine_of(self, optimizer: Optimizer) -> Engine | None:
        return next((engine for engine in self._engines if engine.owns(optimizer)), None)

    @property
    def _engines(self) -> list[Engine]:
        return [slot.engine for slot in self._slots if slot.engine is not None]
