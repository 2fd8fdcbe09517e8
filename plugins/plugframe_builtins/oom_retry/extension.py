"""An extension that retries steps in smaller micro-batches when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.base import Extension
from plugframe.errors import OrderError, SettingError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe.utils.logging import warn_caller
from plugframe_builtins.oom_retry import batches, plugin
from plugframe_builtins.oom_retry.averaging import Units
from plugframe_builtins.oom_retry.before import NEW, Before
from plugframe_builtins.oom_retry.mean import Mean
from plugframe_builtins.oom_retry.memory import free_memory, is_out_of_memory

#: Reported by a rank that did not run out of memory; larger than any micro-batch.
_FINE = torch.iinfo(torch.int32).max
_NORMALISING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Part = Callable[[int, int], Any]


def _refused(hook: str) -> Any:
    """Return a wrapper that refuses collectives within a step, which a rank out of memory would never reach."""

    @hookimpl(wrapper=True)
    def wrapper(self: OomRetry) -> Generator[None, Any, Any]:
        if self.inside and not self.alone:
            raise OrderError(
                f"{hook} was called within a step that oom-retry runs: a rank whose memory runs out before it would "
                "leave the others waiting. Exchange what the step returns, after run()."
            )
        return (yield)

    return wrapper


class OomRetry(Extension):
    """Run a step again with half as many samples at a time when any rank runs out of memory.

    ::

        retry = lite.extension("oom-retry")

        def step(batch):
            inputs, targets = batch
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            lite.backward(loss)
            return loss

        for batch in loader:
            optimizer.zero_grad()
            loss = retry.run(batch, step)
            optimizer.step()

    Gradients equal those of the full batch for losses that are means over samples. See docs/out-of-memory.md.

    Args:
        min_micro_batch: smallest number of samples; running out of memory with it is an error.
        micro_batch: initial number of samples; None for full batches.

    Attributes:
        micro_batch: current number of samples, equal on all ranks; None while full batches fit.
    """

    def __init__(self, *, min_micro_batch: int = 1, micro_batch: int | None = None) -> None:
        plugin.validate(self, min_micro_batch=min_micro_batch, micro_batch=micro_batch)
        if micro_batch is not None and micro_batch < min_micro_batch:
            raise SettingError(
                f"micro_batch={micro_batch} of extension 'oom-retry' is below min_micro_batch={min_micro_batch}."
            )
        self.min_micro_batch = min_micro_batch
        self.micro_batch = micro_batch
        self.inside = False
        self._weight = 1.0
        self._backwards = 0
        self._context: Context | None = None
        self._units = Units()

    @property
    def alone(self) -> bool:
        """Whether this is the only rank."""
        return self._context is None or self._context.world.world_size == 1

    def run(
        self,
        batch: Any,
        step: Callable[[Any], Any],
        *,
        size: int | None = None,
        take: Callable[[Any, int, int], Any] | None = None,
    ) -> Any:
        """Call ``step(part)`` for all parts of `batch`: the full batch until memory runs out. All ranks must call it.

        `step` computes the mean loss of its samples and calls ``lite.backward``, which
        weighs each part by its share of the samples. It must not step an optimizer, nor communicate between
        ranks. If any rank runs out of memory, all ranks undo the step (gradients, buffers, generators), halve the
        parts and start again. Gradients are averaged once, after the last part.

        Args:
            batch: tensors with equal first dimensions, in any nesting of containers.
            size: number of samples in a batch of another form, with `take`.
            take: ``take(batch, start, stop)`` returns a slice of a batch of another form.

        Returns:
            The mean over samples of the results of `step`: a tensor or a number, or a dict of those; None for None.

        Raises:
            torch.OutOfMemoryError: on all ranks, if `min_micro_batch` samples are too many; gradients are as before.
        """
        context = self._ready(size, take)
        samples = batches.count(batch) if size is None else size

        def part(start: int, stop: int) -> Any:
            if take is not None:
                return take(batch, start, stop)
            return batch if stop - start == samples else batches.take(batch, start, stop, size=samples)

        if not self.alone:
            self._units.prepare(context)
        before = Before(context, self._units.modules(), self._units.parameters())
        try:
            result, uses, tried = self._settle(context, before, samples, part, step)
        except BaseException:
            before.restore()
            raise
        before.accumulate()
        if not self.alone:
            self._units.average(context, {parameter for parameter, use in uses.items() if use == NEW})
            before.forget(uses)
        if tried:
            self._tell(context, tried)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the number of samples that fit."""
        return {"micro_batch": self.micro_batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`."""
        self.micro_batch = state["micro_batch"]

    collective_all_gather = _refused("collective_all_gather")
    collective_all_reduce = _refused("collective_all_reduce")
    collective_reduce_scatter = _refused("collective_reduce_scatter")
    collective_broadcast = _refused("collective_broadcast")
    collective_send = _refused("collective_send")
    collective_recv = _refused("collective_recv")
    collective_all_to_all = _refused("collective_all_to_all")
    collective_scatter = _refused("collective_scatter")
    collective_all_gather_object = _refused("collective_all_gather_object")
    collective_gather_object = _refused("collective_gather_object")
    collective_broadcast_object = _refused("collective_broadcast_object")
    collective_barrier = _refused("collective_barrier")
    collective_monitored_barrier = _refused("collective_monitored_barrier")

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self._context = context

    @hookimpl
    def on_teardown(self) -> None:
        self._context = None
        self._units.clear()

    @hookimpl(wrapper=True)
    def strategy_setup_module(self, module: nn.Module) -> Generator[None, Any, Any]:
        engine = yield
        self._add(module, engine)
        return engine

    @hookimpl(wrapper=True)
    def strategy_setup_module_and_optimizers(self, module: nn.Module) -> Generator[None, Any, Any]:
        engine, optimizers = yield
        self._add(module, engine)
        return engine, optimizers

    def _add(self, module: nn.Module, engine: Any) -> None:
        assert self._context is not None
        self._units.add(self._context, module, engine)

    @hookimpl(wrapper=True)
    def strategy_backward(self, loss: Tensor) -> Generator[None, Any, Any]:
        self._backwards += 1
        if self._weight == 1.0:
            return (yield)
        weight = self._weight
        # Scales the gradient: the loss is the caller's object, and cannot be replaced here.
        register: Any = loss.register_hook
        handle = register(lambda gradient: gradient * weight)
        try:
            return (yield)
        finally:
            handle.remove()

    def _ready(self, size: int | None, take: Any) -> Context:
        if self._context is None or not self._units.modules():
            raise OrderError("oom-retry runs steps of models that were set up: call lite.setup(model, ...) first.")
        if self.inside:
            raise OrderError("A step that oom-retry runs cannot run another one: call run() once for a batch.")
        if not torch.is_grad_enabled():
            raise OrderError("oom-retry runs training steps, and gradients are off: call an evaluation step by itself.")
        if (size is None) != (take is None):
            raise SettingError("run() takes size= and take= together: how many samples there are, and some of them.")
        return self._context

    def _settle(
        self, context: Context, before: Before, samples: int, part: Part, step: Callable[[Any], Any]
    ) -> tuple[Any, dict[int, int], list[int]]:
        """Run all parts, smaller ones until they fit on every rank.

        Returns:
            The mean result, the use of each parameter on any rank, and the sizes that did not fit.
        """
        limit = self.micro_batch
        tried: list[int] = []
        while True:
            size = max(1, min(samples, limit or samples))
            mean, error = self._attempt(context, part, step, samples, size)
            failed, uses = self._agree(context, _FINE if error is None else size, before.uses())
            if failed == _FINE:
                self.micro_batch = limit
                return mean.value(), uses, tried
            before.again()
            tried.append(failed)
            limit = max(-(-failed // 2), self.min_micro_batch)
            if limit >= failed:
                raise self._too_large(context, tried, error) from error
            # The error's traceback holds frames, and with them the memory.
            del mean, error
            free_memory(context.device)

    def _attempt(
        self, context: Context, part: Part, step: Callable[[Any], Any], samples: int, size: int
    ) -> tuple[Mean, BaseException | None]:
        mean = Mean()
        self.inside, self._backwards = True, 0
        try:
            with self._units.apart(context):
                for start in range(0, max(samples, 1), size):
                    stop = min(start + size, samples)
                    self._weight = (stop - start) / samples if samples else 1.0
                    mean.add(step(part(start, stop)), self._weight)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return mean, error
        finally:
            self.inside, self._weight = False, 1.0
        if not self._backwards and any(p.grad is not None for p in self._units.parameters()):
            raise OrderError("The step computed gradients by itself, which oom-retry cannot weigh: use lite.backward.")
        return mean, None

    def _agree(self, context: Context, size: int, uses: dict[int, int]) -> tuple[int, dict[int, int]]:
        """Return the smallest of the ranks' sizes, and the largest use of each parameter."""
        if self.alone:
            return size, uses
        # On the host, where the error is raised: the device is not waited for.
        mine = torch.tensor([-size, *uses.values()], dtype=torch.int32)
        least, *most = context.hooks.collective_all_reduce(tensor=mine, op="max", group=None).tolist()
        return -least, dict(zip(uses, most, strict=True))

    def _too_large(self, context: Context, tried: list[int], error: BaseException | None) -> Exception:
        texts = context.hooks.collective_all_gather_object(obj=error and str(error), group=None)
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
        return torch.OutOfMemoryError(
            f"Memory ran out on rank {rank} with {_listed(tried)} at a time, and min_micro_batch="
            f"{self.min_micro_batch} allows no fewer. {text}"
        )

    def _tell(self, context: Context, tried: list[int]) -> None:
        if context.world.global_rank:
            return
        message = f"Memory ran out with {_listed(tried)} at a time: oom-retry goes on with {self.micro_batch}."
        parts = [part for module in self._units.modules() for part in module.modules()]
        if any(isinstance(part, _NORMALISING) and part.training for part in parts):
            message += " Batch normalisation sees only so many samples now, and its results are not those of the batch."
        warn_caller(message)


def _listed(sizes: list[int]) -> str:
    *first, last = map(str, sizes)
    return f"{', '.join(first)} and {last} samples" if first else f"{last} sample{'s' if last != '1' else ''}"
