"""Accumulate gradients over micro-batches: `Lite.accumulate`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn

from plugframe.adopt import state_of
from plugframe.adopt.accumulation import Accumulation
from plugframe.adopt.optimizer import OptimizerState
from plugframe.data.iteration import LoaderState
from plugframe.errors import OrderError, SettingError
from plugframe.lite import checks

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite

T = TypeVar("T")


class Accumulated(Generic[T]):
    """The batches of a loader, several accumulated for each optimizer step. Iterate it once."""

    def __init__(
        self,
        lite: Lite,
        loader: Iterable[T],
        models: tuple[nn.Module, ...],
        *,
        steps: int,
        weight: Callable[[T], Any] | None,
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise SettingError(f"accumulate(steps={steps!r}): it is the number of micro-batches of a step, 1 or above.")
        if not lite._modules:
            raise OrderError("accumulate() before any model was set up: call lite.setup(model, optimizer) first.")
        for model in models:
            checks.check_set_up(model, "accumulate", lite._hooks)
        self._lite = lite
        self._loader = loader
        self._weight = weight
        self._accumulation = Accumulation(models or lite._living(), steps)

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[T]:
        job, own = self._lite._job_state, self._accumulation
        before = job.accumulation
        if before is not None and before.number and before.accumulating and not before.ended:
            before.end()  # an exception has left its loop, or it is an outer loop, which raises when it goes on
        if before is not None and before.ended:
            before.check_used()
        job.accumulation = own
        try:
            for number, of, batch, weight, total in self._micro_batches():
                with self._unsynchronised(number < of):
                    own.begin(number, of, weight=weight, total=total)
                    yield batch
                    if job.accumulation is not own:
                        raise OrderError("Another lite.accumulate() was started inside the loop over this one.")
                if number == of and _has_optimizers(job):
                    own.check_used()
            job.accumulation = None
        finally:
            own.end()
            if job.accumulation is own and not own.ended:
                job.accumulation = None

    def _unsynchronised(self, accumulating: bool) -> ExitStack:
        """Return a context in which a micro-batch that is not the last of its step is not synchronised."""
        stack = ExitStack()
        for model in self._accumulation.models if accumulating else ():
            engine = state_of(model).engine
            stack.enter_context(self._lite._hooks.strategy_no_sync(module=model, engine=engine, enabled=True))
        return stack

    def _micro_batches(self) -> Iterator[tuple[int, int, T, float, float | None]]:
        """Yield number of the micro-batch, number of micro-batches of its step, batch, weight and sum of weights."""
        remaining = self._num_batches()
        iterator = iter(self._loader)
        while remaining > 0:  # nothing is read ahead
            of = min(self._accumulation.steps, remaining)
            remaining -= of
            for number in range(1, of + 1):
                batch = next(iterator, self)
                if batch is self:
                    if number == 1:
                        return
                    raise OrderError(
                        f"accumulate(): the loader ended after {number - 1} of {of} micro-batches, earlier than its "
                        "length says, and the gradients are not synchronised: correct the __len__ of its sampler."
                    )
                yield number, of, batch, 0.0, None  # type: ignore[misc]
        while window := [
            (batch, self._weight_of(batch)) for batch in itertools.islice(iterator, self._accumulation.steps)
        ]:
            total, of = None, len(window)
            if self._weight is not None:
                total = sum_over_ranks(self._lite, sum(weight for _, weight in window))
                if not total:
                    raise SettingError("accumulate(weight=…) is 0 for all batches of a step on all ranks: no mean.")
            for number in range(1, of + 1):
                batch, weight = window.pop(0)  # released one after the other
                yield number, of, batch, weight, total

    def _num_batches(self) -> int:
        """Return the number of batches that the coming pass will yield; 0 if it is not known for certain."""
        state: Any = state_of(self._loader)
        if self._weight is not None or not isinstance(state, LoaderState) or not state.indexed:
            return 0
        saved = state.resume_from or {}
        if not state.training() or saved.get("origin"):
            return 0
        try:
            return len(self) - int(saved.get("position", 0))
        except TypeError:  # a sampler without a length
            return 0

    def _weight_of(self, batch: Any) -> float:
        if self._weight is None:
            return 0.0
        number = float(self._weight(batch))
        if not 0 <= number < float("inf"):
            raise SettingError(f"accumulate(weight=…) returned {number!r}: it is a number of samples or tokens.")
        state = state_of(self._loader)
        # A batch that repeats samples of another rank counts nothing.
        return number if not isinstance(state, LoaderState) or not state.passes or state.passes[-1].weight else 0.0


def sum_over_ranks(lite: Lite, value: float) -> float:
    """Return the sum of a number over all ranks."""
    if lite.world_size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    return float(lite._hooks.collective_all_reduce(tensor=tensor, op="sum", group=None))


def _has_optimizers(job: Any) -> bool:
    return any(state.job is job for state in OptimizerState.alive)
