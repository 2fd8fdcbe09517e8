"""Log of this rank's last collective calls and the user's source line of each."""

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

#: Number of calls that the log holds.
SIZE = 64
#: Index of the field of an entry that is True once the call has ended.
END = 9
#: Index of the field with the start time.
BEGAN = 8
#: What the other rank of a message calls.
COUNTERPARTS = {"collective_send": "recv", "collective_recv": "send"}
#: End of the description of a message in a group.
GROUP = " in a group"

_getframe, _now = sys._getframe, time.monotonic

_OURS, _THEIRS, _USERS = 1, 2, 3
_STANDARD = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
_CORE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")

Entry = list[Any]


@dataclass(frozen=True)
class Call:
    """A call that all ranks, all ranks of a group, or the two ranks of a message must make.

    Attributes:
        number: number of calls of all ranks that this rank has made, this one included.
        hook: name of the hook.
        name: name of the user's call: ``"all_reduce"``, ``"save"``, ``"step"``.
        what: shape, dtype and operation: ``"(3, 4) float32 sum"``; empty without a tensor.
        file: path of the user's source file.
        line: line in that file.
        done: whether the call has ended.
        peer: the other global rank of a message; None for other calls.
    """

    number: int
    hook: str
    name: str
    what: str
    file: str
    line: int
    done: bool
    peer: int | None = None

    @property
    def counterpart(self) -> str:
        """What the other rank of a message calls, ``"recv"`` or ``"send"``; empty for other calls."""
        return "" if self.peer is None else COUNTERPARTS.get(self.hook, "")

    @property
    def site(self) -> str:
        """Source location: ``train.py:57``."""
        return site(self.file, self.line)

    @property
    def text(self) -> str:
        """Description: ``all_reduce of (3, 4) float32 (train.py:57, call 812)``."""
        of = f" of {self.what}" if self.what else ""
        return f"{self.name}{of} ({self.site}, call {self.number})"

    def as_dict(self) -> dict[str, Any]:
        """Return a dict of JSON values."""
        return asdict(self)


class CallLog:
    """Ring buffer of a rank's last calls. Recording one takes about a microsecond; text is only formatted on request.

    Args:
        packages: top-level packages whose frames are skipped when looking for the user's line, besides plugframe,
            torch and the standard library.

    Attributes:
        count: number of calls of all ranks; calls of a group of ranks are not counted.
    """

    def __init__(self, packages: Iterable[str] = ()) -> None:
        self.count = 0
        self._packages = {"torch", *packages} - {"__main__", "__mp_main__"}
        self._entries: deque[Entry] = deque(maxlen=SIZE)
        self._files: dict[str, int] = {}
        self._kind_of, self._append = self._files.get, self._entries.append

    def begin(self, hook: str, tensor: Any, detail: Any, everyone: bool, peer: int | None = None) -> Entry:
        """Record the start of a call, from the hook's wrapper only. Set ``entry[END]`` once the call has ended.

        Args:
            tensor: has a shape, which may be a string, and a dtype; None without a tensor.
            detail: what else describes the operation; an int is the source rank.
            everyone: whether all ranks make this call.
            peer: the other rank of a message.
        """
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
        # Store the instruction: finding its line takes longer the longer the user's function is.
        entry = [self.count, hook, called, of, dtype, detail, frame.f_code, frame.f_lasti, _now(), False, peer]
        self._append(entry)
        return entry

    def calls(self, number: int = SIZE) -> list[Call]:
        """Return the last `number` calls, oldest first."""
        return [_call(entry) for entry in list(self._entries)[-number:]]

    def running(self) -> Call | None:
        """Return the innermost running call, None if there is none."""
        return next((_call(entry) for entry in reversed(list(self._entries)) if not entry[END]), None)

    def waited_s(self) -> float:
        """Return the time in seconds that the innermost running call has taken so far; 0 without one."""
        return next((time.monotonic() - e[BEGAN] for e in reversed(list(self._entries)) if not e[END]), 0.0)

    def waiting(self) -> tuple[Call, float] | None:
        """Return the innermost running call and its start time on the clock of `time.monotonic`; None without one."""
        entry = next((entry for entry in reversed(list(self._entries)) if not entry[END]), None)
        return None if entry is None else (_call(entry), entry[BEGAN])

    def last(self) -> Call | None:
        """Return the latest call that has ended, None if there is none."""
        return next((_call(entry) for entry in reversed(list(self._entries)) if entry[END]), None)

    def is_users(self, frame: FrameType) -> bool:
        """Return whether a frame belongs to the user's code."""
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
    """Return a source location for messages: ``train.py:57``, ``package/__init__.py:3``."""
    folder, name = os.path.split(file)
    if name in ("__init__.py", "__main__.py"):
        name = f"{os.path.basename(folder)}/{name}"
    return f"{name}:{line}"


def _call(entry: Entry) -> Call:
    number, hook, called, shape, dtype, detail, code, instruction, _, done, peer = entry
    line = _line(code, instruction)
    return Call(number, hook, _name(hook, called), _what(shape, dtype, detail), code.co_filename, line, done, peer)


def _line(code: CodeType, instruction: int) -> int:
    lines = (line for start, end, line in code.co_lines() if start <= instruction < end)
    return next(lines, None) or code.co_firstlineno


def _name(hook: str, called: CodeType | None) -> str:
    name = called.co_name if called is not None else ""
    return name if name.isidentifier() and not name.startswith("_") else hook.partition("_")[2] or hook


def _what(shape: Any, dtype: Any, detail: Any) -> str:
    text = shape if isinstance(shape, str) else str(tuple(shape or ()))
    words = [] if shape is None else [text, str(dtype).removeprefix("torch.")]
    if detail is not None:
        words.append(f"src={detail}" if isinstance(detail, int) else str(detail))
    return " ".join(filter(None, words))
