"""The loaders of one job, and where they stand."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from plugframe.data.batch_weights import Weights
from plugframe.data.iteration import LoaderState

#: What is a number in the place of a loader that is saved.
_NUMBERS = ("number", "seed", "epoch", "position")


class Loaders:
    """The loaders of one job, by number, as long as the user keeps them.

    Attributes:
        active: those that are being read.
        begun: whether any was read, since a checkpoint was loaded.
        weights: of the batches at hand.
        passes: how many passes were begun.
    """

    def __init__(self, weights: Weights) -> None:
        self.active: list[LoaderState] = []
        self.begun = False
        self.weights = weights
        self.passes = 0
        self._next = 0
        self._states: weakref.WeakValueDictionary[int, LoaderState] = weakref.WeakValueDictionary()
        #: Datasets that were compared: later they may keep what belongs to a rank, such as a cache.
        self._compared: dict[int, weakref.ref[Any]] = {}
        self._waiting: dict[int, tuple[Mapping[str, Any], Mapping[str, Any] | None, bool]] = {}

    def number(self) -> int:
        """Return a number for another loader, the same on every rank.

        Loaders that a script sets up once more after it has loaded a checkpoint have the numbers they had; those
        it makes on the way, such as one for each evaluation, have the numbers they would have had.
        """
        if self._waiting and not self.begun:
            return min(self._waiting)
        self._next += 1
        return self._next - 1

    def is_new(self, dataset: Any) -> bool:
        """Say whether a dataset was never set up before; one that cannot be known again always is."""
        self._compared = {key: ref for key, ref in self._compared.items() if ref() is not None}
        if id(dataset) in self._compared:
            return False
        with suppress(TypeError):
            self._compared[id(dataset)] = weakref.ref(dataset)
        return True

    def add(self, state: LoaderState) -> None:
        """Remember a loader; one that a checkpoint knows resumes at its position."""
        state.job = self
        state.weights = self.weights
        self.weights.active |= state.count > 1
        state.early = not self.begun
        self._states[state.order.number] = state
        if state.order.number in self._waiting:
            common, own, same = self._waiting.pop(state.order.number)
            state.go_on(common, own, same=same)

    def clear(self) -> None:
        """Forget all."""
        self.active.clear()
        self._states.clear()
        self._waiting.clear()
        self.weights.clear()
        self._next, self.begun = 0, False

    def where(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return where all loaders stand, for a checkpoint: what all ranks share, and what is this rank's own."""
        states = {number: state.where() for number, state in sorted(self._states.items())}
        common = {"next": self._next, "known": [common for common, _ in states.values()]}
        return common, {str(number): own for number, (_, own) in states.items()}

    def problem(self, common: Any, own: Any) -> str | None:
        """Return why `go_on` would fail, None if it would not; nothing is changed."""
        try:
            numbers = [common["next"], *(kept[key] for kept in common["known"] for key in _NUMBERS)]
            if not all(type(number) is int and number >= 0 for number in numbers):
                return "the positions of the loaders are no numbers"
            for kept in common["known"]:
                state = self._states.get(kept["number"])
                mine = None if own is None else own.get(str(kept["number"]))
                problem = None if state is None else state.problem(kept, mine)
                if problem is not None:
                    return problem
        except Exception as error:  # noqa: BLE001 a file may hold anything
            return f"the positions of the loaders are none: {type(error).__name__}: {error}"
        return None

    def remember(self) -> Callable[[], None]:
        """Return what undoes `go_on`."""
        before = dict(self._waiting), self._next, self.begun
        backs = [state.remember() for state in self._states.values()]

        def back() -> None:
            self._waiting, self._next, self.begun = before
            for each in backs:
                each()

        return back

    def go_on(self, common: Mapping[str, Any], own: Mapping[str, Any] | None, *, same: bool) -> None:
        """Have every loader go on where `where` was asked, also one that is still to be set up."""
        self._waiting.clear()
        for kept in common["known"]:
            number = kept["number"]
            mine = None if own is None else own.get(str(number))
            if number in self._states:
                self._states[number].go_on(kept, mine, same=same)
            elif number >= self._next and (kept["early"] or kept["position"] or kept.get("origin")):
                self._waiting[number] = (kept, mine, same)
        self._next = max(self._next, common["next"])
        self.begun = False
