"""An extension that runs a step again, in smaller parts, when memory runs out."""

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

#: What a rank says that did not run out of memory; all that did say less.
_FINE = torch.iinfo(torch.int32).max
_NORMALISING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Part = Callable[[int, int], Any]


def _refused(hook: str) -> Any:
    """Return a wrapper that refuses an exchange within a step, which a rank without memory would never reach."""

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
    """Run a step again with half as many samples at a time when memory runs out on any rank.

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

    The gradients are those of the whole batch for losses that are means over samples. See docs/out-of-memory.md.

    Args:
        min_micro_batch: samples below which a step is not divided: then running out of memory is an error.
        micro_batch: samples at a time to begin with; None begins with whole batches.

    Attributes:
        micro_batch: samples at a time now, equal on all ranks; None while whole batches fit.
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
        """Whether this rank is the only one."""
        return self._context is None or self._context.world.world_size == 1

    def run(
        self,
        batch: Any,
        step: Callable[[Any], Any],
        *,
        size: int | None = None,
        take: Callable[[Any, int, int], Any] | None = None,
    ) -> Any:
        """Call ``step(part)`` for all parts of `batch`; they are the whole batch until memory runs out. All ranks must.

        `step` computes the loss of the samples it is given, a mean over them, and calls ``lite.backward``; that
        weighs each part by its share of the samples. It must not step an optimizer, nor exchange anything between
        ranks. On memory running out on any rank all ranks undo the step (gradients, buffers, generators), halve the
        parts and begin it anew. Gradients are exchanged once, after the last part.

        Args:
            batch: tensors of one first dimension, in any nesting of containers.
            size: samples in a batch of another form, with `take`.
            take: ``take(batch, start, stop)`` returns some samples of a batch of another form.

        Returns:
            The mean over samples of what `step` returned: a tensor or a number, or a dict of those; None for None.

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
        """Begin with what `state_dict` gave."""
        self.micro_batch = state["micro_batch"]

    collective_all_gather = _refused("collective_all_gather")
    collective_all_reduce = _refused("collective_all_reduce")
    collective_reduce_scatter = _refused("collective_reduce_scatter")
    collective_broadcast = _refused("collective_broadcast")
    collective_all_gather_object = _refused("collective_all_gather_object")
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
        # On its gradient: the loss itself stays what the caller sees, and cannot be exchanged for another here.
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
            The mean result, the use that any rank has made of each parameter, and the sizes that did not fit.
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
            # The error holds the frames it was raised in, and with them what has filled the memory.
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
        """Return the smallest of the ranks' sizes, and the most use that any has made of each parameter."""
        if self.alone:
            return size, uses
        # On the host, where memory that ran out is noticed: the device is not waited for.
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
