"""Which batch a loss was computed from, and so how much it weighs against those of the other ranks.

A batch weighs 1 but for the last window of an epoch (see `plugframe.data.sharding`), and everything here rests until
a batch with another weight is handed over. From then on a model's call looks for the batch that its inputs come
from, by identity and by storage, and marks its outputs in the autograd graph; `backward` reads the marks. So it does
not matter in which order batches are read and used.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plugframe.errors import OrderError
from plugframe.utils.logging import warn_caller
from plugframe.utils.tree import leaves

if TYPE_CHECKING:
    from plugframe.data.iteration import Reading

#: Key of the mark in the metadata of a node of the autograd graph.
_MARK = "plugframe.weight"

_AHEAD = (
    "This loss belongs to one of several batches that were read ahead, and the last of them is uneven between ranks; "
    "its model got none of their tensors. Pass the batch, as in lite.backward(loss, batch=batch), set the loader up "
    "with weigh_uneven=False, or use DataLoader(drop_last=True)."
)
_SEVERAL = (
    "This loss belongs to batches of several loaders, which are uneven between ranks in different ways. Call the model "
    "for each batch by itself, set the loaders up with weigh_uneven=False, or use DataLoader(drop_last=True)."
)
_NESTED = (
    "This loss adds up batches that are uneven between ranks in different ways, and one model's output of one is the "
    "input of another: call lite.backward() for each batch by itself."
)

_TWICE = (
    "The last batch of a loader on this rank repeats samples of another rank, to keep step with it in training, and it "
    "was not trained on: whatever it was counted in has them twice. Turn gradients off before the loop (with "
    "torch.no_grad(): for batch in loader: ...), or weigh what you count with lite.batch_weight."
)
_PARTS = (
    "A loader that is divided between ranks was evaluated, and nothing was reduced or gathered before the training "
    "went on: each rank's result is of its own part of the samples. Use lite.all_reduce() or lite.all_gather() on it."
)

Weight = float | str

#: How many batches are remembered before those that have gone are looked for.
_FEW = 8


class Entry:
    """A batch that was handed over.

    Attributes:
        weight: against those of the other ranks.
        reading: the pass it belongs to.
        matched: whether a model was given any of it.
    """

    __slots__ = ("matched", "reading", "refs", "weight")

    def __init__(self, weight: float, reading: Reading) -> None:
        self.weight = weight
        self.reading = reading
        self.matched = False
        self.refs: list[weakref.ref[Any]] = []

    def alive(self) -> bool:
        """Say whether anybody holds any of it."""
        return any(ref() is not None for ref in self.refs)


class _Known:
    """Batches by the objects in them, and by the storages of their tensors."""

    def __init__(self) -> None:
        self._objects: dict[int, tuple[weakref.ref[Any], Entry]] = {}
        self._storages: dict[int, list[tuple[weakref.ref[Any], int, int, Entry]]] = {}
        self._limit = _FEW

    def add(self, batch: Any, entry: Entry) -> None:
        for leaf in leaves(batch):
            try:
                ref = weakref.ref(leaf)
            except TypeError:  # a number, a string
                continue
            entry.refs.append(ref)
            self._objects[id(leaf)] = (ref, entry)
            if isinstance(leaf, Tensor):
                self._add_storage(leaf, ref, entry)
        if len(self._objects) > self._limit:
            self._prune()

    def _add_storage(self, tensor: Tensor, ref: weakref.ref[Any], entry: Entry) -> None:
        span = _span(tensor)
        if span is None:
            return
        storage, start, end = span
        # A view that outlives the tensor keeps its storage. One of a storage that holds more lives as long as itself:
        # an in-memory dataset is always there.
        if end - start >= storage.nbytes():
            ref = weakref.ref(storage)
            entry.refs.append(ref)
        self._storages.setdefault(id(storage), []).append((ref, start, end, entry))

    def find(self, value: Any) -> Entry | None:
        """Return the batch that an object, or the memory of a tensor, belongs to."""
        ref, entry = self._objects.get(id(value), (None, None))
        if ref is not None and ref() is value:
            return entry
        span = _span(value) if self._storages and isinstance(value, Tensor) else None
        if span is not None:
            storage, start, end = span
            for ref, first, last, entry in self._storages.get(id(storage), ()):
                if first <= start and end <= last and start < end and ref() is not None:
                    return entry
        return None

    def _prune(self) -> None:
        self._objects = {key: (ref, entry) for key, (ref, entry) in self._objects.items() if ref() is not None}
        kept = {key: [each for each in found if each[0]() is not None] for key, found in self._storages.items()}
        self._storages = {key: found for key, found in kept.items() if found}
        self._limit = 2 * len(self._objects) + _FEW


class Weights:
    """What the batches at hand weigh, in one job.

    Attributes:
        active: whether there is a loader whose batches can be uneven.
        uneven: whether a batch that does not weigh 1 may be at hand; without, nothing below is called in a step.
        used: whether a model ran since this was last taken note of.
        trains: the same of a model in training mode with gradients, or of a backward.
        graded: whether a model ran with gradients since the last backward, and its outputs were not marked.
        backwards: how many there were.
        met: whether the script exchanged something between ranks since this was last taken note of.
        open: the passes that are being read, the one read last at the end.
        exchanges: counts the collectives so far, where evaluations make none by themselves; None if nobody can.
        speaks: whether this rank says what holds for all.
        parts: that count, after an evaluation in whose results nothing was exchanged; None after any other.
    """

    exchanges: Callable[[], int] | None = None
    speaks = False

    def __init__(self) -> None:
        self.open: list[Reading] = []
        self._reset()

    def clear(self) -> None:
        """Forget all."""
        self.check_padding()
        self._reset()

    def _reset(self) -> None:
        self.active = self.uneven = self.used = self.trains = self.graded = self.met = False
        self.backwards = 0
        self.open.clear()
        self._known = _Known()
        self._pending: list[Entry] = []
        self._current: Weight | None = None
        self._padding: tuple[Entry, int] | None = None
        self._told_parts = False
        self.parts: int | None = None

    # ------------------------------------------------------------------ reading

    def hand_over(self, reading: Reading, batch: Any) -> None:
        """Take note of a batch that is not known to be one of a plain loop's even ones."""
        entry = Entry(reading.weight, reading)
        self._known.add(batch, entry)
        while reading.entries and not reading.entries[0].alive():
            reading.entries.popleft()
        reading.entries.append(entry)
        if reading.weight != 1.0:
            self.uneven = True
            self._pending.append(entry)
        if not reading.weight:
            self._padding = (entry, self.backwards)

    def to_front(self, reading: Reading) -> None:
        """Take note of which of the open passes is read."""
        if self.open and self.open[-1] is not reading and reading in self.open:
            self.open.remove(reading)
            self.open.append(reading)

    def close(self, reading: Reading) -> None:
        """Take note that a pass is over."""
        self.absorb()
        reading.closed = True
        if reading.opening and not reading.used:
            reading.ahead = True  # its only batch was kept
        if reading in self.open:  # not after tear-down
            self.open.remove(reading)
        self.moved_on()
        evaluated = reading.used and not reading.trains and not reading.met and reading.count > 1
        if evaluated and self.exchanges is not None and self.exchanges() == reading.exchanges:
            self.parts = reading.exchanges

    def check_parts(self) -> None:
        """Say once that the results of an evaluation were each rank's own, if the training goes on after it."""
        parts, self.parts = self.parts, None
        if self.speaks and self.exchanges is not None and self.exchanges() == parts and not self._told_parts:
            self._told_parts = True
            warn_caller(_PARTS)

    def check_padding(self, *, exchanged: bool = False) -> None:
        """Say it if a batch that only keeps step was not trained on, and so counted in something else.

        Args:
            exchanged: whether the script exchanges a result now; without, a model must have seen the batch: a loop
                that only reads may want nothing of it.
        """
        if self._padding is None:
            return
        entry, backwards = self._padding
        reading = entry.reading
        if self.backwards != backwards:
            self._padding = None
        elif reading.closed and (exchanged or reading.used) and not (reading.ahead and self._kept(reading)):
            self._padding = None
            warn_caller(_TWICE)

    @staticmethod
    def _kept(reading: Reading) -> bool:
        """Say whether somebody keeps the batches of a pass, and may still train on them."""
        return any(entry.alive() for entry in list(reading.entries)[:-1])

    def moved_on(self) -> None:
        """Forget which batch the last forward belonged to: another was handed over."""
        self._current = None

    def absorb(self) -> None:
        """Have the open passes take note of what the script has done since."""
        for reading in self.open:
            reading.used |= self.used
            reading.trains |= self.trains
            reading.met |= self.met
        self.used = self.trains = self.met = False

    def begin(self, reading: Reading) -> None:
        """Take note that the first batch of a pass is about to be handed over."""
        self.absorb()
        reading.used = reading.trains = reading.met = False
        reading.exchanges = self.exchanges() if self.exchanges is not None else None
        self.check_padding()
        self._pending = [entry for entry in self._pending if self._counts(entry, reading)]
        self.uneven = bool(self._pending) or any(each.weight != 1.0 for each in self.open if each is not reading)

    @staticmethod
    def _counts(entry: Entry, beginning: Reading) -> bool:
        reading = entry.reading
        if not reading.closed:
            return True
        if reading.owner is beginning.owner and not entry.alive():  # read anew: what became of it does not matter now
            return False
        # Of a pass that was read in step with the training nothing is left to be trained on.
        return reading.ahead and (entry.alive() or not entry.matched)

    # ------------------------------------------------------------------ in the model's call

    def of(self, inputs: Any) -> Weight:
        """Return the weight of the batch that a model's inputs come from; a text that says why there is none."""
        found = {id(entry): entry for entry in map(self._known.find, leaves(inputs)) if entry is not None}
        if not found:
            return self._unmatched()
        for entry in found.values():
            entry.matched = True
        weights = {entry.weight for entry in found.values()}
        self._current = weights.pop() if len(weights) == 1 else _SEVERAL
        return self._current

    def mark(self, outputs: Any, weight: Weight) -> None:
        """Mark what a model has made of a batch of that weight."""
        for leaf in leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                metadata: Any = leaf.grad_fn.metadata
                metadata[_MARK] = weight

    def _unmatched(self) -> Weight:
        """Return the weight of a loss whose model saw no tensor of any batch."""
        if self._current is not None:
            return self._current  # generated in a step that has used the batch already
        if not self.open:
            left = (entry for entry in self._pending if entry.reading.ahead and entry.reading.even)
            return _AHEAD if any(not entry.matched for entry in left) else 1.0
        # Read since the last backward: several if they are read side by side, the inner one of loops within each other.
        readings = [reading for reading in self.open if reading.stamp == self.backwards] or self.open[-1:]
        if not torch.is_grad_enabled():
            readings = self.open[-1:]
        if any(reading.ahead and reading.mixed and not self._is_last(reading) for reading in readings):
            return _AHEAD
        weights = {reading.weight for reading in readings}
        return weights.pop() if len(weights) == 1 else _SEVERAL

    def _is_last(self, reading: Reading) -> bool:
        """Say whether of a pass that was read ahead the batch read last is the only one that somebody holds."""
        return reading.entries[-1].alive() and not self._kept(reading)

    # ------------------------------------------------------------------ in backward

    def current(self) -> float:
        """Return what the batch at hand weighs: that of the last call of a model, or the one that was read since.

        Raises:
            OrderError: if it cannot be known.
        """
        if self._current is None and self.open and not self.open[-1].ahead:
            return self.open[-1].weight
        return _counted(self._unmatched(), "mean")

    def exchanged(self) -> None:
        """Take note that the script exchanges something between ranks."""
        self.met = True
        self.parts = None  # not every collective of plugframe's own is counted
        self.check_padding(exchanged=True)

    def asked(self) -> None:
        """Take note that the script weighs what it counts by itself."""
        self._padding = None

    def weigh(self, loss: Tensor, batch: Any, reduction: str) -> tuple[float, list[Any]]:
        """Return what to multiply `loss` with; and where it adds up several batches, handles of hooks that weigh them.

        Of a sum every batch counts whole, but for one that only keeps step.

        Raises:
            OrderError: if its batches cannot be known.
        """
        marks = [] if batch is not None else list(_marked(loss, through=False))
        if batch is None and not marks and self.graded:
            return 1.0, []  # its model ran before any uneven batch was read
        if not marks:
            weight = self.of(batch) if batch is not None else self._unmatched()
            return _counted(weight, reduction), []
        weights = {_counted(weight, reduction) for _, weight in marks if not isinstance(weight, str)}
        texts = [weight for _, weight in marks if isinstance(weight, str)]
        if texts and len(weights) != 1:
            raise OrderError(texts[0])
        nested = len(list(_marked(loss, through=True))) != len(marks)
        if len(weights) == 1:
            weight = weights.pop()
            if weight == 1.0 or nested or not self.graded:
                return weight, []
            # A forward of before the uneven batch was read may be in it too, which is not marked and weighs 1.
            return 1.0, [node.register_prehook(_scaling(weight)) for node, _ in marks]
        if nested:
            raise OrderError(_NESTED)
        return 1.0, [node.register_prehook(_scaling(_counted(weight, reduction))) for node, weight in marks]


def _counted(weight: Weight, reduction: str) -> float:
    if isinstance(weight, str):
        raise OrderError(weight)
    return weight if reduction == "mean" else float(weight > 0)


def _scaling(weight: float) -> Any:
    """Return a hook of a node of the autograd graph that multiplies the gradients that come in."""
    return lambda gradients: tuple(None if each is None else each * weight for each in gradients)


def _span(tensor: Tensor) -> tuple[Any, int, int] | None:
    """Return the storage of a tensor, and where in memory its elements begin and end; None if it has no plain one."""
    try:
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return None
        storage = tensor.untyped_storage()
        start = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # a subclass without memory of its own
        return None
    if not tensor.numel():
        return storage, start, start
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return storage, start, start + extent * tensor.element_size()


def _marked(loss: Tensor, *, through: bool) -> Iterator[tuple[Any, Weight]]:
    """Yield the marked nodes of the graph of `loss`; without `through` those reached without passing another."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        metadata: Any = node.metadata
        weight = metadata.get(_MARK)
        if weight is not None:
            yield node, weight
            if not through:
                continue
        todo.extend(following for following, _ in node.next_functions)
