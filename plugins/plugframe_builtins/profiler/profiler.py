"""An extension that times the other plugins' hooks."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from plugframe.base import Extension
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe.utils.logging import warn_caller
from plugframe_builtins.profiler import plugin
from plugframe_builtins.profiler.trace import Trace


def _timed(hook: str) -> Any:
    """Return a wrapper that times every call of a hook; nested calls are nested events."""

    @hookimpl(wrapper=True)
    def wrapper(self: Profiler) -> Generator[None, Any, Any]:
        start_ns = self.now_ns()
        try:
            return (yield)
        finally:
            self.trace.add(hook, start_ns, self.now_ns())

    return wrapper


class Profiler(Extension):
    """Time the plugins' hooks and write a Chrome trace at tear-down; open it at https://ui.perfetto.dev.

    With several ranks every rank writes its own file, ``plugframe-trace.rank0.json`` and so on. Gaps between
    forward, backward and step are the script's own code.

    Args:
        path: the file; an existing one is replaced.
        max_events: number of events to keep, the first ones; the others are counted.
        synchronize: whether to wait for the device before every clock reading. Otherwise asynchronous GPU
            work counts where the script next waits for it; with it, the run is slower and the times are accurate.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "plugframe-trace.json",
        *,
        max_events: int = 200_000,
        synchronize: bool = False,
    ) -> None:
        plugin.validate(self, max_events=max_events, synchronize=synchronize)
        self.path = Path(path)
        self.max_events = max_events
        self.synchronize = synchronize
        self.trace = Trace(max_events)
        self._context: Context | None = None

    strategy_setup_module_and_optimizers = _timed("strategy_setup_module_and_optimizers")
    strategy_setup_module = _timed("strategy_setup_module")
    strategy_setup_optimizers = _timed("strategy_setup_optimizers")
    strategy_next_batch = _timed("strategy_next_batch")
    strategy_backward = _timed("strategy_backward")
    strategy_optimizer_step = _timed("strategy_optimizer_step")
    strategy_clip_gradients = _timed("strategy_clip_gradients")
    accelerator_move_batch = _timed("accelerator_move_batch")
    collective_all_gather = _timed("collective_all_gather")
    collective_all_reduce = _timed("collective_all_reduce")
    collective_reduce_scatter = _timed("collective_reduce_scatter")
    collective_broadcast = _timed("collective_broadcast")
    collective_send = _timed("collective_send")
    collective_recv = _timed("collective_recv")
    collective_all_to_all = _timed("collective_all_to_all")
    collective_scatter = _timed("collective_scatter")
    collective_all_gather_object = _timed("collective_all_gather_object")
    collective_gather_object = _timed("collective_gather_object")
    collective_broadcast_object = _timed("collective_broadcast_object")
    collective_barrier = _timed("collective_barrier")
    collective_monitored_barrier = _timed("collective_monitored_barrier")
    checkpoint_save = _timed("checkpoint_save")
    checkpoint_load = _timed("checkpoint_load")

    @hookimpl(wrapper=True)
    def precision_forward_context(self) -> Generator[None, Any, Any]:
        # The hook only creates the context; the forward runs inside it.
        context = yield
        return self._forward(context)

    @contextmanager
    def _forward(self, context: AbstractContextManager[Any]) -> Iterator[Any]:
        start_ns = self.now_ns()
        try:
            with context as entered:
                yield entered
        finally:
            self.trace.add("forward", start_ns, self.now_ns())

    def now_ns(self) -> int:
        """Return the time, after synchronising the device if requested."""
        if self.synchronize and self._context is not None:
            self._context.hooks.accelerator_synchronize(device=self._context.device)
        return time.perf_counter_ns()

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self._context = context

    @hookimpl
    def on_teardown(self) -> None:
        context, self._context = self._context, None
        if context is None:
            return
        trace, self.trace = self.trace, Trace(self.max_events)
        rank = context.world.global_rank
        path = self.path
        if context.world.world_size > 1:
            path = path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
        trace.write(path, rank=rank)
        if trace.dropped and rank == 0:
            warn_caller(
                f"{path} holds the first {trace.max_events} events; {trace.dropped} later ones were dropped: "
                "use Profiler(max_events=…) for more."
            )
