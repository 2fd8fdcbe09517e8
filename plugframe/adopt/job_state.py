"""The state of a job that adopted modules and optimizers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from plugframe.adopt.accumulation import Accumulation
from plugframe.data.batch_weights import BatchWeights
from plugframe.data.random_check import RandomStreamCheck


class JobState:
    """What a job is doing now.

    Attributes:
        in_backward: whether gradients are being computed: a forward then is a recomputation by activation
            checkpointing, inside of a call that has returned.
        backward_called: whether ``lite.backward`` was ever called.
        num_backwards: number of backwards that synchronised gradients.
        no_sync: whether a backward now does not synchronise gradients.
        random_check: compares random numbers between ranks in the first steps; None afterwards.
        explain_error: returns, for an error caused by another rank, an error that reports the state of all ranks; None
            for other errors.
        weights: weights of the batches in use.
        alone: whether the job has one rank.
        accumulation: the micro-batches that are being accumulated; None outside of `Lite.accumulate`.
        bar: the progress bar that is drawn.
        plain_backward: whether `Lite.backward` is that of the loss and nothing else, outside of `Lite.accumulate`: set
            after the first one of a job of one rank whose hooks add nothing.
        warned_divided: whether the script was warned that it divides losses that are divided already.
    """

    in_backward = False
    backward_called = False
    num_backwards = 0
    no_sync = False
    random_check: RandomStreamCheck | None = None
    alone = False
    accumulation: Accumulation | None = None
    bar: Any = None
    plain_backward = False
    warned_divided = False
    explain_error: Callable[[RuntimeError], Exception | None] | None = None

    def __init__(self) -> None:
        self.weights = BatchWeights()

    @property
    def accumulating(self) -> bool:
        """Whether more micro-batches follow before the optimizer steps."""
        return self.accumulation is not None and self.accumulation.accumulating


def track_no_sync(job: JobState, no_sync: Callable[..., Any]) -> Callable[..., Any]:
    """Return the hook ``strategy_no_sync`` extended to set `JobState.no_sync`."""

    @contextmanager
    def tracked(context: Any, enabled: bool) -> Iterator[None]:
        before, job.no_sync = job.no_sync, enabled
        try:
            with context:
                yield
        finally:
            job.no_sync = before

    def hook(**arguments: Any) -> Any:
        return tracked(no_sync(**arguments), arguments["enabled"])

    return hook
