"""Run calls in a forked subprocess: one that hangs or crashes affects only its own result."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class NoAnswer(Exception):
    """A call did not return; the message describes how it failed."""


def each_apart(look: Callable[[T], Any], things: Sequence[T], *, timeout_s: float) -> Iterator[tuple[T, Any]]:
    """Yield every thing with ``look(thing)``, or with a `NoAnswer`.

    They are called in a copy of this process, and after one that hangs or ends it in a new copy. Where the system
    cannot copy processes they are called here.

    Args:
        look: its result is carried by JSON.
        things: in this order.
        timeout_s: how long one call may take.
    """
    if not hasattr(os, "fork"):
        yield from ((thing, look(thing)) for thing in things)
        return
    left = list(things)
    while left:
        copy = _Copy(look, left)
        try:
            while left:
                answer = copy.next(timeout_s)
                yield left.pop(0), answer
                if isinstance(answer, NoAnswer):
                    break
        finally:
            copy.end()


class _Copy(Generic[T]):
    """A fork of this process that sends results through a pipe, one line each."""

    def __init__(self, look: Callable[[T], Any], things: Sequence[T]) -> None:
        self._read, write = os.pipe()
        self._unread = b""
        sys.stdout.flush()
        sys.stderr.flush()
        self._child = os.fork()
        if self._child == 0:
            _answer(look, things, self._read, write)
        os.close(write)

    def next(self, timeout_s: float) -> Any:
        """Return the next answer, or a `NoAnswer`."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._read], [], [], left_s)[0]:
                return NoAnswer(f"did not come back within {timeout_s:g} s")
            part = os.read(self._read, 65536)
            if not part:
                _, ending = os.waitpid(self._child, 0)
                self._child = 0
                return NoAnswer(f"ended the process ({_ending(os.waitstatus_to_exitcode(ending))})")
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        """Kill the subprocess."""
        os.close(self._read)
        if self._child:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _answer(look: Callable[[T], Any], things: Sequence[T], read: int, write: int) -> None:
    """Send the result for every item, then exit without running exit handlers of the parent program."""
    try:
        os.close(read)
        os.dup2(2, 1)  # plugins must not print into the command's output
        sys.stdout = sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115  until the copy ends
        for thing in things:
            line = json.dumps(look(thing)).encode() + b"\n"
            while line:
                line = line[os.write(write, line) :]
    finally:
        sys.stderr.flush()
        os._exit(0)
