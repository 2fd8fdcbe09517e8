"""Weights of batches: match each loss to the batch it was computed from.

A batch weighs 1 except in the last window of an epoch (see `plugframe.data.sharding`), and this module does nothing
until a batch with another weight is read. From then on, a model's call looks up the batch of its inputs, by identity
and by storage, and marks its outputs in the autograd graph; `backward` reads the marks. So batches may be read and
used in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plugframe.data.batch_index import BatchIndex, BatchRecord
from plugframe.errors import OrderError
from plugframe.utils.logging import warn_caller
from plugframe.utils.tree import leaves

if TYPE_CHECKING:
    from plugframe.data.loader_pass import LoaderPass

#: Key of the mark in the metadata of a node of the autograd graph.
_MARK = "plugframe.weight"

_AHEAD = (
    "This loss belongs to one of several batches that were read ahead, and the last of them is uneven between ranks; "
    "its model got none of their tensors. Pass the batch, as in lite.backward(loss, batch=batch), set the loader up "
    "with weigh_uneven=False, or use DataLoader(drop_last=True)."
)
_SEVERAL = (
    "This loss belongs to batches of several loaders, which are uneven between ranks in different ways. Call the model "
    "for each batch separately, set the loaders up with weigh_uneven=False, or use DataLoader(drop_last=True)."
)
_NESTED = (
    "This loss adds up batches that are uneven between ranks in different ways, and one model's output is another's "
    "input: call lite.backward() for each batch separately."
)

_REPEATED = (
    "The last batch of a loader on this rank repeats samples of another rank, to run the same number of training "
    "steps, and it was not trained on: results computed from it count these samples twice. Turn gradients off before "
    "the loop (with torch.no_grad(): for batch in loader: ...), or multiply by lite.batch_weight."
)
_UNREDUCED = (
    "A loader that is divided between ranks was evaluated, and nothing was reduced or gathered before training "
    "continued: each rank's result covers only its own samples. Use lite.all_reduce() or lite.all_gather() on it."
)

#: A weight, or the error message that explains why it is unknown.
Weight = float | str


class BatchWeights:
    """The weights of the batches that are in use in one job.

    Attributes:
        active: whether any loader may return uneven batches.
        uneven: whether a batch with a weight other than 1 may be in use; if not, steps skip all look-ups.
        model_called: whether a model was called since `update_passes`.
        trains: whether a model was called in training mode with gradients, or `backward`, since `update_passes`.
        unmarked: whether a model was called with gradients since the last backward, and its outputs were not marked.
        num_backwards: number of backwards so far.
        num_evaluations: number of model calls in evaluation mode so far.
        num_closed: number of passes that are over.
        communicated: whether the script called a collective since `update_passes`.
        open_passes: the passes that are being read, most recently read last.
        num_collectives: returns the number of collectives so far, where evaluations make none by themselves; None if
            they cannot be counted.
        warns: whether this rank warns for all.
        unreduced_at: the number of collectives at the end of an evaluation without any; None after any other pass.
    """

    num_collectives: Callable[[], int] | None = None
    warns = False

    def __init__(self) -> None:
        self.open_passes: list[LoaderPass] = []
        self._reset()

    def clear(self) -> None:
        """Drop all records and the counter, after a last check for repeated samples."""
        self.warn_repeated()
        self._reset()
        # It is a method of the process group, whose threads end with it: not when the garbage collector comes by.
        self.num_collectives = None

    def _reset(self) -> None:
        self.active = self.uneven = self.model_called = self.trains = self.unmarked = self.communicated = False
        self.num_backwards = self.num_evaluations = self.num_closed = 0
        self.open_passes.clear()
        self._index = BatchIndex()
        self._pending: list[BatchRecord] = []
        self._current: Weight | None = None
        self._padding: tuple[BatchRecord, int] | None = None
        self._warned_unreduced = False
        self.unreduced_at: int | None = None

    # ------------------------------------------------------------------ reading

    def record_batch(self, loader_pass: LoaderPass, batch: Any) -> None:
        """Record a batch, unless it is an even one of a plain loop."""
        record = BatchRecord(loader_pass.weight, loader_pass)
        self._index.add(batch, record)
        while loader_pass.records and not loader_pass.records[0].alive():
            loader_pass.records.popleft()
        loader_pass.records.append(record)
        if loader_pass.weight != 1.0:
            self.uneven = True
            self._pending.append(record)
        if not loader_pass.weight:
            self._padding = (record, self.num_backwards)

    def move_to_end(self, loader_pass: LoaderPass) -> None:
        """Make an open pass the most recently read one."""
        if self.open_passes and self.open_passes[-1] is not loader_pass and loader_pass in self.open_passes:
            self.open_passes.remove(loader_pass)
            self.open_passes.append(loader_pass)

    def close_pass(self, loader_pass: LoaderPass) -> None:
        """Record the end of a pass."""
        self.update_passes()
        loader_pass.closed = True
        self.num_closed += 1
        if loader_pass.at_first_batch and not loader_pass.model_called:
            loader_pass.ahead = True  # its only batch is unused so far
        if loader_pass in self.open_passes:  # not after tear-down
            self.open_passes.remove(loader_pass)
        self.forget_current()
        evaluated = loader_pass.model_called and not loader_pass.trains and not loader_pass.communicated
        if not evaluated or loader_pass.count == 1 or self.num_collectives is None:
            return
        if self.num_collectives() == loader_pass.num_collectives:
            self.unreduced_at = loader_pass.num_collectives

    def warn_unreduced(self) -> None:
        """Warn once if training continues after an evaluation whose results were not reduced."""
        unreduced_at, self.unreduced_at = self.unreduced_at, None
        if not self.warns or self._warned_unreduced or self.num_collectives is None:
            return
        if self.num_collectives() == unreduced_at:
            self._warned_unreduced = True
            warn_caller(_UNREDUCED)

    def warn_repeated(self, *, in_collective: bool = False) -> None:
        """Warn if a batch that repeats samples of another rank was not trained on, and so is counted in a result.

        Args:
            in_collective: whether the script is calling a collective; if not, a model must have been called: a loop
                that only reads may ignore the batch.
        """
        if self._padding is None:
            return
        record, num_backwards = self._padding
        loader_pass = record.loader_pass
        if self.num_backwards != num_backwards:
            self._padding = None
            return
        used = in_collective or loader_pass.model_called
        if loader_pass.closed and used and not (loader_pass.ahead and self._has_earlier_batches(loader_pass)):
            self._padding = None
            warn_caller(_REPEATED)

    @staticmethod
    def _has_earlier_batches(loader_pass: LoaderPass) -> bool:
        """Return whether batches before the last of a pass are still referenced, and may be trained on."""
        return any(record.alive() for record in list(loader_pass.records)[:-1])

    def forget_current(self) -> None:
        """Forget the batch of the latest forward: another one was read."""
        self._current = None

    def update_passes(self) -> None:
        """Record in the open passes the model calls and collectives since the last update."""
        for loader_pass in self.open_passes:
            loader_pass.model_called |= self.model_called
            loader_pass.trains |= self.trains
            loader_pass.communicated |= self.communicated
        self.model_called = self.trains = self.communicated = False

    def begin_pass(self, loader_pass: LoaderPass) -> None:
        """Record the beginning of a pass, before its first batch is returned."""
        self.update_passes()
        loader_pass.model_called = loader_pass.trains = loader_pass.communicated = False
        loader_pass.num_collectives = self.num_collectives() if self.num_collectives is not None else None
        self.warn_repeated()
        self._pending = [record for record in self._pending if self._may_be_trained_on(record, loader_pass)]
        others = (each for each in self.open_passes if each is not loader_pass)
        self.uneven = bool(self._pending) or any(each.weight != 1.0 for each in others)

    @staticmethod
    def _may_be_trained_on(record: BatchRecord, beginning: LoaderPass) -> bool:
        loader_pass = record.loader_pass
        if not loader_pass.closed:
            return True
        if loader_pass.owner is beginning.owner and not record.alive():  # the loader is read again
            return False
        # A pass that was read in step with the training leaves no batch to be trained on.
        return loader_pass.ahead and (record.alive() or not record.matched)

    # ------------------------------------------------------------------ in the model's call

    def weight_of(self, inputs: Any) -> Weight:
        """Return the weight of the batch that a model's inputs come from, or the message of an error."""
        found = {id(record): record for record in map(self._index.find, leaves(inputs)) if record is not None}
        if not found:
            return self._unmatched_weight()
        for record in found.values():
            record.matched = True
        weights = {record.weight for record in found.values()}
        self._current = weights.pop() if len(weights) == 1 else _SEVERAL
        return self._current

    def mark(self, outputs: Any, weight: Weight) -> None:
        """Mark a model's outputs with the weight of the batch they were computed from."""
        for leaf in leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                metadata: Any = leaf.grad_fn.metadata
                metadata[_MARK] = weight

    def _unmatched_weight(self) -> Weight:
        """Return the weight of a loss whose model was called with no tensor of any batch."""
        if self._current is not None:
            return self._current  # inputs were generated in a step that has used the batch already
        if not self.open_passes:
            pending = (r for r in self._pending if r.loader_pass.ahead and r.loader_pass.even)
            return _AHEAD if any(not record.matched for record in pending) else 1.0
        # Those read since the last backward: several if read side by side, the innermost one of nested loops.
        passes = [each for each in self.open_passes if each.num_backwards == self.num_backwards]
        if not passes or not torch.is_grad_enabled():
            passes = self.open_passes[-1:]
        if any(each.ahead and each.mixed and not self._only_last_alive(each) for each in passes):
            return _AHEAD
        weights = {each.weight for each in passes}
        return weights.pop() if len(weights) == 1 else _SEVERAL

    def _only_last_alive(self, loader_pass: LoaderPass) -> bool:
        """Return whether the batch read last is the only one of a pass that is still referenced."""
        return loader_pass.records[-1].alive() and not self._has_earlier_batches(loader_pass)

    # ------------------------------------------------------------------ in backward

    def current(self) -> float:
        """Return the weight of the current batch: that of the latest model call, or the one read since.

        Raises:
            OrderError: if it is ambiguous.
        """
        if self._current is None and self.open_passes and not self.open_passes[-1].ahead:
            return self.open_passes[-1].weight
        return _factor(self._unmatched_weight(), "mean")

    def on_collective(self) -> None:
        """Record that the script calls a collective."""
        self.communicated = True
        self.unreduced_at = None  # not every collective of plugframe itself is counted
        self.warn_repeated(in_collective=True)

    def on_weight_requested(self) -> None:
        """Record that the script uses the weight itself."""
        self._padding = None

    def weigh(self, loss: Tensor, batch: Any, reduction: str) -> tuple[float, list[Any]]:
        """Return the factor of a loss, and handles of hooks that scale its terms if it adds up several batches.

        With ``reduction="sum"`` every batch has the factor 1, except one that repeats samples, which has 0.

        Raises:
            OrderError: if its batches are ambiguous.
        """
        marks = [] if batch is not None else list(_marked_nodes(loss, through=False))
        if batch is None and not marks and self.unmarked:
            return 1.0, []  # its model was called before any uneven batch was read
        if not marks:
            weight = self.weight_of(batch) if batch is not None else self._unmatched_weight()
            return _factor(weight, reduction), []
        weights = {_factor(weight, reduction) for _, weight in marks if not isinstance(weight, str)}
        messages = [weight for _, weight in marks if isinstance(weight, str)]
        if messages and len(weights) != 1:
            raise OrderError(messages[0])
        nested = len(list(_marked_nodes(loss, through=True))) != len(marks)
        if len(weights) == 1:
            weight = weights.pop()
            if weight == 1.0 or nested or not self.unmarked:
                return weight, []
            # The loss may include an unmarked forward from before the uneven batch, whose weight is 1.
            return 1.0, [node.register_prehook(_scale_by(weight)) for node, _ in marks]
        if nested:
            raise OrderError(_NESTED)
        return 1.0, [node.register_prehook(_scale_by(_factor(weight, reduction))) for node, weight in marks]


def _factor(weight: Weight, reduction: str) -> float:
    if isinstance(weight, str):
        raise OrderError(weight)
    return weight if reduction == "mean" else float(weight > 0)


def _scale_by(weight: float) -> Any:
    """Return a prehook of an autograd node that multiplies incoming gradients."""
    return lambda gradients: tuple(None if each is None else each * weight for each in gradients)


def _marked_nodes(loss: Tensor, *, through: bool) -> Iterator[tuple[Any, Weight]]:
    """Yield the marked nodes of the graph of `loss`.

    Args:
        through: whether to go on behind a marked node.
    """
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        metadata: Any = node.metadata
        weight = metadata.get(_MARK)
        if weight is not None:
            yield node, weight
            if not through:
                continue
        stack.extend(following for following, _ in node.next_functions)
