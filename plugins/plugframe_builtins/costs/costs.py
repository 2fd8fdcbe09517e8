"""An extension that measures time per phase and memory."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from plugframe.base import Extension, failing, tell
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins._shared.memory import Memory

_READING, _MOVING, _FORWARD = "reading batches", "moving batches", "forward"
_BACKWARD, _STEP, _COLLECTIVES, _SAVING = "backward", "optimizer steps", "collectives of the script", "checkpoints"


def _timed(phase: str) -> Any:
    """Return a hook wrapper that adds the duration of each call to a phase."""

    @hookimpl(wrapper=True)
    def wrapper(self: Costs) -> Generator[None, Any, Any]:
        with self.spent(phase):
            return (yield)

    return wrapper


class Costs(Extension):
    """Measure the time of every phase, and memory; rank 0 prints both at tear-down.

    The time of a phase excludes phases nested in it. Clocks are read after synchronising the device, so that
    GPU work counts in its phase; that makes a run slower. Time is measured from the end of the first step, which
    includes one-time work, to the end of the last one.
    """

    def __init__(self) -> None:
        self._context: Context | None = None
        self._memory = Memory()
        self._spent: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        self._steps: list[float] = []
        self._phases: dict[str, float] = {}

    strategy_next_batch = _timed(_READING)
    accelerator_move_batch = _timed(_MOVING)
    strategy_backward = _timed(_BACKWARD)
    strategy_clip_gradients = _timed(_STEP)
    collective_all_gather = _timed(_COLLECTIVES)
    collective_all_reduce = _timed(_COLLECTIVES)
    collective_reduce_scatter = _timed(_COLLECTIVES)
    collective_broadcast = _timed(_COLLECTIVES)
    collective_send = _timed(_COLLECTIVES)
    collective_recv = _timed(_COLLECTIVES)
    collective_all_to_all = _timed(_COLLECTIVES)
    collective_scatter = _timed(_COLLECTIVES)
    collective_all_gather_object = _timed(_COLLECTIVES)
    collective_gather_object = _timed(_COLLECTIVES)
    collective_broadcast_object = _timed(_COLLECTIVES)
    collective_barrier = _timed(_COLLECTIVES)
    collective_monitored_barrier = _timed(_COLLECTIVES)
    checkpoint_save = _timed(_SAVING)
    checkpoint_load = _timed(_SAVING)

    @hookimpl(wrapper=True)
    def strategy_setup_module_and_optimizers(
        self, module: nn.Module, optimizers: Sequence[Optimizer]
    ) -> Generator[None, Any, Any]:
        made = yield
        self._memory.watch(module, optimizers)
        return made

    @hookimpl(wrapper=True)
    def strategy_optimizer_step(self) -> Generator[None, Any, Any]:
        with self.spent(_STEP):
            made = yield
        self._memory.look()
        if not self._steps:
            self._spent.clear()
        self._steps.append(self._now())
        self._phases = dict(self._spent)
        return made

    @hookimpl(wrapper=True)
    def precision_forward_context(self) -> Generator[None, Any, Any]:
        # The hook only creates the context; the forward runs inside it.
        context = yield
        return self._forward(context)

    @contextmanager
    def _forward(self, context: AbstractContextManager[Any]) -> Iterator[Any]:
        with self.spent(_FORWARD), context as entered:
            yield entered

    @contextmanager
    def spent(self, phase: str) -> Iterator[None]:
        """Add the duration of the block to a phase, excluding nested phases."""
        start = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            seconds = self._now() - start
            self._spent[phase] += seconds - self._inner.pop()
            if self._inner:
                self._inner[-1] += seconds

    def _now(self) -> float:
        if self._context is not None:
            self._context.hooks.accelerator_synchronize(device=self._context.device)
        return time.perf_counter()

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self._context = context
        self._memory.begin(context.device)

    @hookimpl
    def on_teardown(self) -> None:
        context, self._context = self._context, None
        if context is not None and context.world.global_rank == 0 and not failing():
            for line in [*self._memory.lines(), *self._times()]:
                tell(f"costs: {line}")

    def _times(self) -> list[str]:
        steps = len(self._steps) - 1
        if steps < 1:
            return ["for the time of a step it takes two optimizer steps or more"]
        seconds = self._steps[-1] - self._steps[0]
        spent = {**self._phases, "the script itself": max(seconds - sum(self._phases.values()), 0.0)}
        parts = sorted(spent.items(), key=lambda part: -part[1])
        head = f"{1e3 * seconds / steps:.2f} ms for each of {steps} steps after the first:"
        return [head, *(f"{100 * part / seconds:3.0f} % {phase}" for phase, part in parts if part >= 0.005 * seconds)]
