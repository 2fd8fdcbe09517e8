"""An extension that measures how much is trained per second."""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.base import Extension
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins._shared.training_rate import batch_counts, peak_flops
from plugframe_builtins.throughput import plugin


class Throughput(Extension):
    """Add ``samples_per_s`` and ``peak_memory_gb`` of training to each ``lite.log``, and ``tokens_per_s`` and ``mfu``.

    A rate is that since the last call with a number, of all ranks: what global rank 0 trains on, times the ranks that
    read different data. Evaluation between the steps counts as time. Tokens are the elements of the first tensor of
    a batch that holds integers in two dimensions. ``mfu`` is the part of the peak of 16-bit arithmetic that is used.

    Args:
        flops_per_sample: operations of a training step per sample; 0 for six per parameter and token.
        peak_flops: operations per second of one device at its peak; 0 for that of a known device.

    Attributes:
        num_samples, num_tokens, num_steps: of the run so far, those before the checkpoint included.
        seconds: time between its optimizer steps, likewise.
    """

    def __init__(self, *, flops_per_sample: float = 0.0, peak_flops: float = 0.0) -> None:
        plugin.validate(self, flops_per_sample=flops_per_sample, peak_flops=peak_flops)
        self.flops_per_sample, self.peak_flops = flops_per_sample, peak_flops
        self._context: Context | None = None
        self._forget()

    def _forget(self) -> None:
        self.num_samples = self.num_tokens = self.num_steps = 0
        self.seconds = 0.0
        self._batch: tuple[int, int] | None = None
        self._trained = (0, 0)
        self._stepped_at: float | None = None
        self._modules: list[weakref.ref[nn.Module]] = []
        self._before = (0, 0, 0.0)

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self._context = context
        self._forget()

    @hookimpl
    def on_teardown(self) -> None:
        self._context = None
        self._modules = []

    @hookimpl
    def on_setup(self, module: nn.Module) -> None:
        self._modules.append(weakref.ref(module))

    @hookimpl(wrapper=True)
    def accelerator_move_batch(self, batch: Any) -> Generator[None, Any, Any]:
        self._batch = batch_counts(batch)
        return (yield)

    @hookimpl
    def on_backward(self, loss: Tensor) -> None:
        if self._batch is not None:  # one that is evaluated has no backward
            self._trained = (self._trained[0] + self._batch[0], self._trained[1] + self._batch[1])
            self._batch = None

    @hookimpl
    def on_optimizer_step(self, optimizer: Optimizer) -> None:
        if self._context is None:
            return
        now, (samples, tokens) = time.perf_counter(), self._trained
        self._trained = (0, 0)
        if self._stepped_at is not None:  # the first step is the start of the clock
            count = self._context.hooks.strategy_data_shard()[1]
            self.num_samples += samples * count
            self.num_tokens += tokens * count
            self.seconds += now - self._stepped_at
        self.num_steps += 1
        self._stepped_at = now

    @hookimpl
    def on_log(self, metrics: dict[str, float], step: int | None) -> None:
        context = self._context
        if context is None or context.world.global_rank != 0:
            return
        samples, tokens, seconds = (
            now - before
            for now, before in zip((self.num_samples, self.num_tokens, self.seconds), self._before, strict=True)
        )
        if seconds <= 0 or not samples:
            return
        self._before = (self.num_samples, self.num_tokens, self.seconds)
        found = {"samples_per_s": samples / seconds}
        if tokens:
            found["tokens_per_s"] = tokens / seconds
        used, peak = self._flops(samples, tokens) / seconds, self._peak(context)
        if used and peak:
            found["mfu"] = used / (peak * context.world.world_size)
        stats = context.hooks.accelerator_memory_stats(device=context.device)
        found["peak_memory_gb"] = stats["peak_allocated_bytes"] / 1e9
        for name, value in found.items():
            metrics.setdefault(name, value)

    def _flops(self, samples: float, tokens: float) -> float:
        if self.flops_per_sample:
            return self.flops_per_sample * samples
        alive = (module for module in (reference() for reference in self._modules) if module is not None)
        return 6 * tokens * sum(p.numel() for module in alive for p in module.parameters() if p.requires_grad)

    def _peak(self, context: Context) -> float:
        return self.peak_flops or peak_flops(context.device)

    @hookimpl
    def extension_state(self) -> dict[str, Any]:
        mine = {name: getattr(self, name) for name in ("num_samples", "num_tokens", "num_steps", "seconds")}
        if self._context is None:
            return mine
        # Clocks differ between ranks.
        return dict(self._context.hooks.collective_broadcast_object(obj=mine, src=0, group=None))

    @hookimpl
    def extension_load_state(self, state: dict[str, Any]) -> None:
        self.num_samples, self.num_tokens = state["num_samples"], state["num_tokens"]
        self.num_steps, self.seconds = state["num_steps"], state["seconds"]
        self._before = (self.num_samples, self.num_tokens, self.seconds)
