"""An extension that compares calls across ranks before they run."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import nn

from plugframe.base import Extension
from plugframe.diagnostics.call_log import END, CallLog
from plugframe.diagnostics.instrument import call_log_of, record
from plugframe.errors import CollectiveMismatchError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins.lockstep import plugin
from plugframe_builtins.lockstep.channel import Channel
from plugframe_builtins.lockstep.difference import RankCall, difference


def _compared() -> Any:
    """Return a wrapper for a hook that all ranks call."""

    @hookimpl(wrapper=True)
    def wrapper(self: Lockstep) -> Generator[None, Any, Any]:
        self.compare(None)
        return (yield)

    return wrapper


def _compared_in_group() -> Any:
    """Return a wrapper for a hook that the ranks of a group call."""

    @hookimpl(wrapper=True)
    def wrapper(self: Lockstep, group: Any) -> Generator[None, Any, Any]:
        self.compare(group)
        return (yield)

    return wrapper


class Lockstep(Extension):
    """Compare every collective call before it runs; the first difference is an error on all ranks.

    Compared are the operation, shape, dtype, source line, the number of such calls so far,
    and the numbers of batches read and forwards started with gradients enabled. See docs/divergence.md.

    Messages between two ranks (`collective_send`, `collective_recv`) are neither compared nor counted here: ranks send
    different ones by design, and the collective compares the two calls of each. Not compared either is what may differ
    in a call of all ranks: the number of rows of an all-to-all with sizes, and the shape of what `src` scatters.

    Args:
        sites: whether calls that differ only in their source line are an error too.
    """

    def __init__(self, *, sites: bool = True) -> None:
        plugin.validate(self, sites=sites)
        self.sites = sites
        self._context: Context | None = None
        self._calls: CallLog | None = None
        self._channel: Channel | None = None
        self._undo: Callable[[], None] | None = None
        self._busy = self._sharded = False
        self._batches = self._forwards = 0

    collective_all_gather = _compared_in_group()
    collective_all_reduce = _compared_in_group()
    collective_reduce_scatter = _compared_in_group()
    collective_broadcast = _compared_in_group()
    collective_all_to_all = _compared_in_group()
    collective_scatter = _compared_in_group()
    collective_all_gather_object = _compared_in_group()
    collective_gather_object = _compared_in_group()
    collective_broadcast_object = _compared_in_group()
    collective_barrier = _compared_in_group()
    strategy_setup_module = _compared()
    strategy_setup_optimizers = _compared()
    strategy_setup_module_and_optimizers = _compared()
    strategy_backward = _compared()
    strategy_optimizer_step = _compared()
    strategy_clip_gradients = _compared()
    checkpoint_save = _compared()
    checkpoint_load = _compared()

    @hookimpl(wrapper=True)
    def strategy_next_batch(self, exhausted: Any) -> Generator[None, Any, Any]:
        batch = yield
        # A single rank may evaluate.
        self._batches += batch is not exhausted and torch.is_grad_enabled()
        return batch

    @hookimpl(wrapper=True)
    def precision_forward_context(self) -> Generator[None, Any, Any]:
        # Strategies may communicate in forward; without gradients, replicating ones do not.
        if self._calls is not None and (torch.is_grad_enabled() or self._sharded):
            self._forwards += 1
            entry = self._calls.begin("forward", None, None, True)
            try:
                self.compare(None)
            finally:
                entry[END] = True
        return (yield)

    @hookimpl
    def on_setup(self, module: nn.Module) -> None:
        self._sharded = self._sharded or any(hasattr(parameter, "full_tensor") for parameter in module.parameters())

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self._batches = self._forwards = 0
        self._sharded = False
        if context.world.world_size > 1:
            self._context, self._calls = context, call_log_of(context.hooks) or self._own_log(context)
            self._channel = Channel.open(context)

    def _own_log(self, context: Context) -> CallLog:
        """Record calls here: the session runs without diagnostics."""
        log = CallLog()
        self._undo = record(context.hooks, log, lambda error, late: None)
        return log

    @hookimpl
    def on_teardown(self) -> None:
        self._context = self._calls = None
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def compare(self, group: Any) -> None:
        """Wait for every rank's next call, and compare.

        Raises:
            CollectiveMismatchError: on all ranks, with each rank's call and line.
        """
        if self._calls is None or self._context is None or self._busy:
            return
        call = self._calls.running()
        if call is None:
            return
        word = RankCall(call=call, batches=self._batches, forwards=self._forwards)
        message = json.dumps(word.as_list())
        self._busy = True
        try:
            if group is None and self._channel is not None:
                words = self._channel.exchange(message)
            else:
                words = self._context.hooks.collective_all_gather_object(obj=message, group=group)
        finally:
            self._busy = False
        if words is None or all(each == message for each in words):
            return
        ranks = range(len(words)) if group is None else self._members(group, len(words))
        found = difference({r: RankCall.of(json.loads(w)) for r, w in zip(ranks, words, strict=True)}, sites=self.sites)
        if found:
            raise CollectiveMismatchError(found)

    def _members(self, group: Any, size: int) -> list[int]:
        assert self._context is not None
        try:
            return list(torch.distributed.get_process_group_ranks(group))
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
            return list(range(size))
