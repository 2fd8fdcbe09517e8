"""Print the report of an uncaught job failure and exit with its code, instead of a traceback."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from plugframe.errors import RankFailedError


class JobInterrupt(KeyboardInterrupt):
    """Raised in the launcher after Ctrl-C has stopped the ranks of a function.

    Attributes:
        report: one line for the terminal.
        exit_code: 130.
    """

    def __init__(self, error: RankFailedError) -> None:
        super().__init__(error.report)
        self.report, self.exit_code = error.report, error.exit_code


def install_excepthook() -> None:
    """Install an excepthook that prints the report of an uncaught job failure and exits with its code."""
    if not isinstance(sys.excepthook, _Hook):
        sys.excepthook = _Hook(sys.excepthook)


class _Hook:
    def __init__(self, before: Any) -> None:
        self._before = before

    def __call__(self, kind: type[BaseException], error: BaseException, stack: TracebackType | None) -> None:
        if not isinstance(error, RankFailedError | JobInterrupt):
            self._before(kind, error, stack)
            return
        print(error.report, file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code)  # the interpreter exits with this code
