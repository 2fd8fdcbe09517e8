"""One progress bar for all ranks: `Lite.track`."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TextIO, TypeVar

from plugframe.adopt import state_of
from plugframe.data.iteration import LoaderState
from plugframe.errors import SettingError
from plugframe.lite.notebook_bar import NotebookBar, in_notebook

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite

T = TypeVar("T")

#: Seconds between two drawings of the bar, and between two lines where there is no terminal.
_DRAW_S, _LINE_S = 0.1, 10.0
_WIDTH = 24


class Track(Generic[T]):
    """The items of an iterable, with a progress bar on rank 0. See `Lite.track`."""

    def __init__(
        self, items: Iterable[T], label: str, values: dict[str, Any], *, shown: bool, file: TextIO | None = None
    ) -> None:
        self._items = items
        self._label = label
        self._values = values
        self._shown = shown
        self._file = file
        self._number = self._first = 0
        self._begun = self._drawn_at = 0.0
        self._live = False
        self._notebook: NotebookBar | None = None

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]

    def update(self, **values: Any) -> None:
        """Set the values that are shown: numbers, tensors of one element, or functions that return them.

        They are read when the bar is drawn, some times in a second, so that no step waits for a device.
        """
        self._values |= {name: value.detach() if hasattr(value, "detach") else value for name, value in values.items()}

    def __iter__(self) -> Iterator[T]:
        if not self._shown:
            yield from self._items
            return
        file = self._file or sys.stderr
        self._live = is_live(file)
        self._notebook = NotebookBar() if in_notebook(file) else None
        every = _DRAW_S if self._live or self._notebook is not None else _LINE_S
        state = state_of(self._items)
        saved = state.resume_from if isinstance(state, LoaderState) else None
        self._number = self._first = int((saved or {}).get("position", 0))
        self._begun = self._drawn_at = time.monotonic()
        try:
            for item in self._items:
                self._number += 1
                yield item
                now = time.monotonic()
                if now - self._drawn_at >= every:
                    self._drawn_at = now
                    self._draw(file)
        finally:
            self._draw(file, end=True)
            self._live = False

    def hide(self) -> None:
        """Clear the bar, before something else is printed."""
        if self._live and self._shown:
            print("\r\x1b[K", end="", file=self._file or sys.stderr, flush=True)

    def _total(self) -> int | None:
        try:
            return len(self)
        except (TypeError, NotImplementedError):
            return None

    def _draw(self, file: TextIO, *, end: bool = False) -> None:
        text = self._text(end=end)
        if self._notebook is not None:
            self._notebook.show(text, self._number, self._total())
            return
        if not self._live:
            print(text, file=file, flush=True)
            return
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]}\x1b[K", end="\n" if end else "", file=file, flush=True)

    def _text(self, *, end: bool) -> str:
        passed = max(time.monotonic() - self._begun, 1e-9)
        rate = (self._number - self._first) / passed
        total = self._total()
        parts = [self._label] if self._label else []
        if total and self._live:
            full = min(round(_WIDTH * self._number / total), _WIDTH)
            parts.append("━" * full + "╌" * (_WIDTH - full))
        parts.append(f"{self._number}/{total}" if total else f"{self._number}")
        parts.append(f"{rate:.3g}/s")
        parts += [f"{name} {_shown(name, value)}" for name, value in self._values.items()]
        if end:
            parts.append(f"in {_duration(passed)}")
        elif total and rate:
            parts.append(f"{_duration(max(total - self._number, 0) / rate)} left")
        return "  ".join(parts)


def track(lite: Lite, items: Iterable[T], label: str, values: dict[str, Any]) -> Track[T]:
    """Return the items with a progress bar; see `Lite.track`."""
    lite._job_state.bar = bar = Track(items, label, dict(values), shown=lite.is_global_zero)
    return bar


def hide(lite: Lite) -> None:
    """Clear the bar that is drawn, if any, before something else is printed."""
    if lite._job_state.bar is not None:
        lite._job_state.bar.hide()


def is_live(file: TextIO) -> bool:
    """Return whether a line can be drawn over: a terminal."""
    return file.isatty() and os.environ.get("TERM") != "dumb"


def _shown(name: str, value: Any) -> str:
    if callable(value) and not hasattr(value, "item"):
        try:
            value = value()
        except NameError:  # a variable of the loop that has no value yet
            return "-"
    number: Any = value
    try:
        return f"{float(number):.4g}"
    except (TypeError, ValueError, RuntimeError):
        raise SettingError(
            f"track({name}=…) shows numbers, tensors of one element, and functions that return them, got "
            f"{type(value).__name__}."
        ) from None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
