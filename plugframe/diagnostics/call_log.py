"""The last calls of this rank at which ranks meet, and the line of the user's code that each came from."""

from __future__ import annotations

import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from types import CodeType, FrameType
from typing import Any

#: How many calls are kept.
SIZE = 64
#: Where in an entry it stands whether the call has ended.
END = 9
#: And when it began.
BEGAN = 8

_getframe, _now = sys._getframe, time.monotonic

_OURS, _THEIRS, _USERS = 1, 2, 3
_STANDARD = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
_CORE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")

Entry = list[Any]


@dataclass(frozen=True)
class Call:
    """A call at which ranks meet.

    Attributes:
        number: how many such calls of all ranks this rank had made with it.
        hook: which it is.
        name: what the user called: ``"all_reduce"``, ``"save"``, ``"step"``.
        what: of which tensor, or how: ``"(3, 4) float32"``; empty for none.
        file: of the user's code.
        line: in that file.
        done: whether it has ended.
    """

    number: int
    hook: str
    name: str
    what: str
    file: str
    line: int
    done: bool

    @property
    def site(self) -> str:
        """``train.py:57``."""
        return site(self.file, self.line)

    @property
    def text(self) -> str:
        """``all_reduce of (3, 4) float32 (train.py:57, call 812)``."""
        of = f" of {self.what}" if self.what else ""
        return f"{self.name}{of} ({self.site}, call {self.number})"

    def as_dict(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return asdict(self)


class CallLog:
    """Keeps the last calls of a rank. Keeping one costs about a microsecond; words are made of it when asked.

    Args:
        packages: top-level packages whose frames are passed over when the user's line is looked for, besides
            plugframe, torch and the standard library.

    Attributes:
        count: how many calls of all ranks were made; calls of a group of ranks are not counted.
    """

    def __init__(self, packages: Iterable[str] = ()) -> None:
        self.count = 0
        self._packages = {"torch", *packages} - {"__main__", "__mp_main__"}
        self._entries: deque[Entry] = deque(maxlen=SIZE)
        self._files: dict[str, int] = {}
        self._kind_of, self._keep = self._files.get, self._entries.append

    def begin(self, hook: str, tensor: Any, detail: Any, everyone: bool) -> Entry:
        """Note that a call begins; its caller is the function that wraps it. Set ``entry[END]`` once it has ended."""
        if everyone:
            self.count += 1
        frame: FrameType | None = _getframe(2)
        kind_of, called, fallback = self._kind_of, None, None
        while frame is not None:
            code = frame.f_code
            kind = kind_of(code.co_filename) or self._kind(frame)
            if kind == _USERS:
                break
            if kind == _OURS:
                called = code
            elif fallback is None:
                fallback = frame
            frame = frame.f_back
        frame = frame or fallback or _getframe(2)
        of, dtype = (None, None) if tensor is None else (tensor.shape, tensor.dtype)
        # The instruction: finding its line takes the longer the longer the user's function is.
        entry = [self.count, hook, called, of, dtype, detail, frame.f_code, frame.f_lasti, _now(), False]
        self._keep(entry)
        return entry

    def calls(self, number: int = SIZE) -> list[Call]:
        """Return the last calls, the newest last."""
        return [_call(entry) for entry in list(self._entries)[-number:]]

    def running(self) -> Call | None:
        """Return the innermost call that has not ended, None if there is none."""
        return next((_call(entry) for entry in reversed(list(self._entries)) if not entry[END]), None)

    def waited_s(self) -> float:
        """Return for how many seconds the innermost call that has not ended is running."""
        return next((time.monotonic() - e[BEGAN] for e in reversed(list(self._entries)) if not e[END]), 0.0)

    def waiting(self) -> tuple[Call, float] | None:
        """Return the innermost call that has not ended and when it began, as `time.monotonic` counts."""
        entry = next((entry for entry in reversed(list(self._entries)) if not entry[END]), None)
        return None if entry is None else (_call(entry), entry[BEGAN])

    def last(self) -> Call | None:
        """Return the newest call that has ended, None if there is none."""
        return next((_call(entry) for entry in reversed(list(self._entries)) if entry[END]), None)

    def is_users(self, frame: FrameType) -> bool:
        """Say whether a frame is of the user's code."""
        return (self._files.get(frame.f_code.co_filename) or self._kind(frame)) == _USERS

    def _kind(self, frame: FrameType) -> int:
        file = frame.f_code.co_filename
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package == "plugframe" or file.startswith(_CORE):
            kind = _OURS
        elif package in self._packages or file.startswith((_STANDARD, "<frozen ")) or _INSTALLED.search(file):
            kind = _THEIRS
        else:
            kind = _USERS
        self._files[file] = kind
        return kind


def site(file: str, line: int) -> str:
    """Return a place in the code for a message: ``train.py:57``, ``package/__init__.py:3``."""
    folder, name = os.path.split(file)
    if name in ("__init__.py", "__main__.py"):
        name = f"{os.path.basename(folder)}/{name}"
    return f"{name}:{line}"


def _call(entry: Entry) -> Call:
    number, hook, called, shape, dtype, detail, code, instruction, _, done = entry
    line = _line(code, instruction)
    return Call(number, hook, _name(hook, called), _what(shape, dtype, detail), code.co_filename, line, done)


def _line(code: CodeType, instruction: int) -> int:
    lines = (line for start, end, line in code.co_lines() if start <= instruction < end)
    return next(lines, None) or code.co_firstlineno


def _name(hook: str, called: CodeType | None) -> str:
    name = called.co_name if called is not None else ""
    return name if name.isidentifier() and not name.startswith("_") else hook.partition("_")[2] or hook


def _what(shape: Any, dtype: Any, detail: Any) -> str:
    parts = [] if shape is None else [str(tuple(shape)), str(dtype).removeprefix("torch.")]
    if detail is not None:
        parts.append(f"src={detail}" if isinstance(detail, int) else str(detail))
    return " ".join(parts)
