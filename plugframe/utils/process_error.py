"""The exception that ends a job or its process."""

from __future__ import annotations

import builtins
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn


def failure(error: BaseException | None) -> BaseException | None:
    """Return `error`, or None if it is none or ends a program that did not fail, as ``sys.exit(0)`` does."""
    if isinstance(error, GeneratorExit) or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return None
    return error


class ProcessError:
    """Finds the exception that ends this process or is being handled, other than those from before.

    Created when a job starts: a job may be run by the handler of an exception that is not its own.

    Args:
        close: ends the job, given its error.
        watch_exit: whether to replace ``sys.exit`` until `release`: the interpreter forgets the exit code before it
            runs exit handlers.
    """

    def __init__(self, close: Callable[[BaseException | None], object], *, watch_exit: bool) -> None:
        self._close = close
        self._before = _current()
        self._exit = _Exit() if watch_exit else None

    def close(self) -> None:
        """End the job, at the end of the process."""
        found = self.find()
        if found is None and self._exit is not None:
            found = failure(self._exit.uncaught())
        self._close(found)

    def find(self) -> BaseException | None:
        """Return the exception, or None."""
        return next((failure(error) for error in _current() if not any(error is old for old in self._before)), None)

    def release(self) -> None:
        """Restore ``sys.exit``."""
        if self._exit is not None:
            self._exit.release()


def _current() -> tuple[BaseException, ...]:
    found = [sys.exc_info()[1]]
    # A prompt and a notebook set it after every statement that raises, and go on.
    if not hasattr(sys, "ps1") and not hasattr(builtins, "__IPYTHON__"):
        found.append(getattr(sys, "last_value", None))
    return tuple(error for error in found if error is not None)


class _Exit:
    """Stands for ``sys.exit`` and notes its last call."""

    def __init__(self) -> None:
        self._original: Any = sys.exit
        self._replacement: Any = self._call
        self._error: SystemExit | None = None
        self._outermost: FrameType | None = None
        self._position = -1
        sys.exit = self._replacement

    def _call(self, status: Any = None, /) -> NoReturn:
        if threading.current_thread() is threading.main_thread():
            frame = sys._getframe()
            while frame.f_back is not None:
                frame = frame.f_back
            self._error, self._outermost, self._position = SystemExit(status), frame, frame.f_lasti
        self._original(status)
        raise AssertionError

    def uncaught(self) -> SystemExit | None:
        """Return the error of the last call, unless the program went on after it."""
        same = self._outermost is not None and self._outermost.f_lasti == self._position
        return self._error if same else None

    def release(self) -> None:
        if sys.exit is self._replacement:  # else another library has replaced it in turn, and calls this one
            sys.exit = self._original
        self._error = self._outermost = None
