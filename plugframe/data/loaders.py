"""The loaders of one job, and their positions."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from plugframe.data.batch_weights import BatchWeights
from plugframe.data.iteration import LoaderState

#: Keys of integers in the saved position of a loader.
_INTEGERS = ("number", "seed", "epoch", "position")


class Loaders:
    """The loaders of one job, by number, while the user references them.

    Attributes:
        active: loaders that are being read.
        begun: whether any loader was read since a checkpoint was loaded.
        weights: weights of the batches in use.
        num_passes: number of passes begun.
    """

    def __init__(self, weights: BatchWeights) -> None:
        self.active: list[LoaderState] = []
        self.begun = False
        self.weights = weights
        self.num_passes = 0
        self._next = 0
        self._states: weakref.WeakValueDictionary[int, LoaderState] = weakref.WeakValueDictionary()
        #: Datasets that were compared: later they may store values of one rank, such as a cache.
        self._compared: dict[int, weakref.ref[Any]] = {}
        #: Loaded positions of loaders that are yet to be set up.
        self._waiting: dict[int, tuple[Mapping[str, Any], Mapping[str, Any] | None, bool]] = {}

    def number(self) -> int:
        """Return the number for another loader, the same on every rank.

        Loaders that a script sets up again after loading a checkpoint get the numbers they had; those it makes on the
        way, such as one for each evaluation, get the numbers they would have had.
        """
        if self._waiting and not self.begun:
            return min(self._waiting)
        self._next += 1
        return self._next - 1

    def is_new(self, dataset: Any) -> bool:
        """Return whether a dataset was never set up before; True if it cannot be referenced weakly."""
        self._compared = {key: ref for key, ref in self._compared.items() if ref() is not None}
        if id(dataset) in self._compared:
            return False
        with suppress(TypeError):
            self._compared[id(dataset)] = weakref.ref(dataset)
        return True

    def add(self, state: LoaderState) -> None:
        """Add a loader; it resumes if a loaded checkpoint holds its position."""
        state.job = self
        state.weights = self.weights
        self.weights.active |= state.count > 1
        state.early = not self.begun
        self._states[state.shuffle.number] = state
        if state.shuffle.number in self._waiting:
            common, own, same = self._waiting.pop(state.shuffle.number)
            state.resume(common, own, same=same)

    def clear(self) -> None:
        """Remove all loaders."""
        self.active.clear()
        self._states.clear()
        self._waiting.clear()
        self.weights.clear()
        self._next, self.begun = 0, False

    def capture(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the positions of all loaders, for a checkpoint: values common to all ranks, and those of this rank."""
        states = {number: state.capture() for number, state in sorted(self._states.items())}
        common = {"next": self._next, "known": [common for common, _ in states.values()]}
        return common, {str(number): own for number, (_, own) in states.items()}

    def problem(self, common: Any, own: Any) -> str | None:
        """Return why `resume` would fail, None if it would not; nothing is changed."""
        try:
            numbers = [common["next"], *(saved[key] for saved in common["known"] for key in _INTEGERS)]
            if not all(type(number) is int and number >= 0 for number in numbers):
                return "the positions of the loaders are not integers"
            for saved in common["known"]:
                state = self._states.get(saved["number"])
                mine = None if own is None else own.get(str(saved["number"]))
                problem = None if state is None else state.problem(saved, mine)
                if problem is not None:
                    return problem
        except Exception as error:  # noqa: BLE001 a file may hold anything
            return f"the positions of the loaders are invalid: {type(error).__name__}: {error}"
        return None

    def snapshot(self) -> Callable[[], None]:
        """Return a function that undoes `resume`."""
        before = dict(self._waiting), self._next, self.begun
        undo_each = [state.snapshot() for state in self._states.values()]

        def undo() -> None:
            self._waiting, self._next, self.begun = before
            for each in undo_each:
                each()

        return undo

    def resume(self, common: Mapping[str, Any], own: Mapping[str, Any] | None, *, same: bool) -> None:
        """Make every loader begin at a position returned by `capture`, including loaders yet to be set up."""
        self._waiting.clear()
        for saved in common["known"]:
            number = saved["number"]
            mine = None if own is None else own.get(str(number))
            if number in self._states:
                self._states[number].resume(saved, mine, same=same)
            elif number >= self._next and (saved["early"] or saved["position"] or saved.get("origin")):
                self._waiting[number] = (saved, mine, same)
        self._next = max(self._next, common["next"])
        self.begun = False
