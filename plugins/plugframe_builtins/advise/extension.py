"""An extension that reports where the time of a step goes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from plugframe.base import Extension, failing, tell
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins._shared.memory import Memory
from plugframe_builtins._shared.training_rate import batch_counts, peak_flops
from plugframe_builtins.advise import clock, plugin
from plugframe_builtins.advise.clock import Breakdown, StepClock, breakdown
from plugframe_builtins.advise.findings import Observed, findings

#: On a device that computes while the host goes on, one of so many steps is timed by phase.
_EVERY = 10


def _timed(phase: str) -> Any:
    """Return a hook wrapper that adds the duration of each call to a phase."""

    @hookimpl(wrapper=True)
    def wrapper(self: Advise) -> Generator[None, Any, Any]:
        measured = self._clock
        if measured is None:
            return (yield)
        start_s = measured.enter(phase)
        try:
            return (yield)
        finally:
            measured.leave(phase, start_s)

    return wrapper


class Advise(Extension):
    """Measure some steps, then report on rank 0 where their time goes, the memory, and what would be faster.

    A step reaches from the end of one optimizer step to that of the next. On a device that computes while the host goes
    on, every tenth step waits for it at the end of each phase, and the others run as always. Once the report is made,
    or on another rank, nothing is measured. A run that ends before reports what it has.

    Args:
        steps: number of steps to measure.
        warm_up: number of steps before those.

    Attributes:
        times: the mean step, once it is reported; None before and on other ranks.
        findings: what would be faster, likewise.
    """

    def __init__(self, *, steps: int = 50, warm_up: int = 5) -> None:
        plugin.validate(self, steps=steps, warm_up=warm_up)
        self.steps, self.warm_up = steps, warm_up
        self._forget()

    def _forget(self) -> None:
        self.times: Breakdown | None = None
        self.findings: list[str] = []
        self._context: Context | None = None
        self._clock: StepClock | None = None
        self._memory = Memory()
        self._num_warm = 0
        self._peak = 0.0
        self._batch_tokens = self._num_tokens = 0
        self._loader: tuple[int | None, bool | None] = (None, None)
        self._modules: list[weakref.ref[nn.Module]] = []
        self._slow_optimizer = ""

    strategy_backward = _timed(clock.BACKWARD)
    strategy_clip_gradients = _timed(clock.CLIP)
    collective_all_gather = _timed(clock.COLLECTIVES)
    collective_all_reduce = _timed(clock.COLLECTIVES)
    collective_reduce_scatter = _timed(clock.COLLECTIVES)
    collective_broadcast = _timed(clock.COLLECTIVES)
    collective_send = _timed(clock.COLLECTIVES)
    collective_recv = _timed(clock.COLLECTIVES)
    collective_all_to_all = _timed(clock.COLLECTIVES)
    collective_scatter = _timed(clock.COLLECTIVES)
    collective_all_gather_object = _timed(clock.COLLECTIVES)
    collective_gather_object = _timed(clock.COLLECTIVES)
    collective_broadcast_object = _timed(clock.COLLECTIVES)
    collective_barrier = _timed(clock.COLLECTIVES)
    collective_monitored_barrier = _timed(clock.COLLECTIVES)
    checkpoint_save = _timed(clock.SAVE)

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self._forget()
        if context.world.global_rank == 0:
            self._context = context
            self._memory.begin(context.device)
            self._peak = peak_flops(context.device)

    @hookimpl(wrapper=True)
    def strategy_setup_module_and_optimizers(
        self, module: nn.Module, optimizers: Sequence[Optimizer]
    ) -> Generator[None, Any, Any]:
        made = yield
        if self._context is not None:
            self._memory.watch(module, optimizers)
        return made

    @hookimpl
    def on_setup(self, module: nn.Module) -> None:
        if self._context is not None:
            self._modules.append(weakref.ref(module))

    @hookimpl(wrapper=True)
    def strategy_next_batch(self, iterator: Any) -> Generator[None, Any, Any]:
        measured = self._clock
        if measured is None:
            return (yield)
        # torch's iterators keep the loader's settings in private attributes only.
        self._loader = (getattr(iterator, "_num_workers", None), getattr(iterator, "_pin_memory", None))
        start_s = measured.enter(clock.WAIT)
        try:
            return (yield)
        finally:
            measured.leave(clock.WAIT, start_s)

    @hookimpl(wrapper=True)
    def accelerator_move_batch(self, batch: Any) -> Generator[None, Any, Any]:
        measured = self._clock
        if measured is None:
            return (yield)
        if self._peak:
            self._batch_tokens = batch_counts(batch)[1]
        start_s = measured.enter(clock.COPY)
        try:
            return (yield)
        finally:
            measured.leave(clock.COPY, start_s)

    @hookimpl
    def on_backward(self) -> None:
        if self._clock is not None:  # one that is evaluated has no backward
            self._num_tokens += self._batch_tokens
            self._batch_tokens = 0

    @hookimpl(wrapper=True)
    def precision_forward_context(self) -> Generator[None, Any, Any]:
        # The hook only creates the context; the forward runs inside it.
        context = yield
        return context if self._clock is None else _Forward(self._clock, context)

    @hookimpl(wrapper=True)
    def strategy_optimizer_step(self, optimizer: Optimizer) -> Generator[None, Any, Any]:
        if self._context is None:
            return (yield)
        if self._clock is None:
            made = yield
            self._warm(self._context, optimizer)
            return made
        measured = self._clock
        start_s = measured.enter(clock.OPTIMIZER)
        try:
            made = yield
        finally:
            measured.leave(clock.OPTIMIZER, start_s)
        last = len(measured.steps) == self.steps - 1
        measured.end_step(last=last)
        if last:
            self._memory.look()
            self._report(self._context, measured)
        return made

    def _warm(self, context: Context, optimizer: Optimizer) -> None:
        """Count a step that is not measured, and start the clock after the last of them."""
        self._num_warm += 1
        if self._num_warm >= self.warm_up:
            self._slow_optimizer = _slow(optimizer)
            hooks, device = context.hooks, context.device
            if device.type == "cpu":
                self._clock = StepClock(None, every=1)
            else:
                self._clock = StepClock(lambda: hooks.accelerator_synchronize(device=device), every=_EVERY)
            self._clock.begin()

    @hookimpl
    def on_teardown(self) -> None:
        context, measured = self._context, self._clock
        if context is not None and not failing():
            if measured is not None and measured.steps:
                self._memory.look()
                self._report(context, measured)
            else:
                tell(
                    f"advise: nothing to report: it measures {self.steps} steps after the first {self.warm_up}, and "
                    f"this run made {self._num_warm}; try --extension.advise.warm-up=1"
                )
        self._context = self._clock = None
        self._modules, self._memory = [], Memory()

    def _report(self, context: Context, measured: StepClock) -> None:
        self._context = self._clock = None  # nothing is measured from here on
        self.times = breakdown(measured.steps)
        stats = context.hooks.accelerator_memory_stats(device=context.device)
        is_cpu = context.device.type == "cpu"
        bf16 = context.hooks.accelerator_supports_dtype(dtype=torch.bfloat16, device=context.device)
        observed = Observed(
            times=self.times,
            device=context.device.type,
            world_size=context.world.world_size,
            num_cores=max(_num_cores() // context.world.local_world_size, 1),
            num_workers=self._loader[0],
            pin_memory=self._loader[1],
            slow_optimizer=self._slow_optimizer,
            is_float32=not is_cpu and bool(bf16) and context.names.get("precision") in ("32-true", "32"),
            peak_bytes=stats["peak_allocated_bytes"],
            total_bytes=0 if is_cpu else stats.get("total_bytes", 0),
        )
        self.findings = findings(observed)
        found = [f"{number}. {text}" for number, text in enumerate(self.findings, 1)]
        rate = self._mfu(context, self.times)
        for line in [*_lines(self.times), *self._memory.lines(), *rate, *(found or ["no part stands out"])]:
            tell(f"advise: {line}")

    def _mfu(self, context: Context, times: Breakdown) -> list[str]:
        """Return a line with the part of the device's peak that is used, if that and the tokens are known."""
        if not self._peak or not self._num_tokens:
            return []
        alive = (module for module in (reference() for reference in self._modules) if module is not None)
        count = sum(p.numel() for module in alive for p in module.parameters() if p.requires_grad)
        tokens = self._num_tokens / times.num_steps * context.hooks.strategy_data_shard()[1]
        used = 6 * tokens * count / (times.step_s * self._peak * context.world.world_size)
        return [f"MFU {100 * used:.0f} %: the part of the device's 16-bit peak that is used"]


class _Forward:
    """Time what runs in a context as the forward."""

    def __init__(self, measured: StepClock, context: AbstractContextManager[Any]) -> None:
        self._measured, self._context = measured, context
        self._phase = clock.FORWARD

    def __enter__(self) -> Any:
        if not torch.is_grad_enabled():
            self._phase = clock.NO_GRAD
        entered = self._context.__enter__()
        self._start_s = self._measured.enter(self._phase)
        return entered

    def __exit__(self, *raised: Any) -> bool | None:
        try:
            return self._context.__exit__(*raised)
        finally:
            self._measured.leave(self._phase, self._start_s)


def _lines(times: Breakdown) -> list[str]:
    """Return the lines about time."""
    head = f"{1e3 * times.step_s:.2f} ms a step, of {times.num_steps} steps"
    if times.num_timed < times.num_steps - times.num_left_out:
        head += f", {times.num_timed} of them timed by phase"
    if times.num_left_out:
        head += f", without {times.num_left_out} that save or evaluate"
    parts = sorted(times.phases, key=lambda phase: -times.phases[phase])
    return [f"{head}:", *(f"{100 * times.part(p):3.0f} % {p}" for p in parts if times.part(p) >= 0.005)]


def _slow(optimizer: Optimizer) -> str:
    """Return the name of an optimizer that has a fused form and does not use it, or ""."""
    group = optimizer.param_groups[0]
    return type(optimizer).__name__ if "fused" in group and not group["fused"] else ""


def _num_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
