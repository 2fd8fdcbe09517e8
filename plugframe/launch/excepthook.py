"""What becomes of a job's failure that nobody catches: its report, and its exit code, in place of a traceback."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from plugframe.errors import RankFailedError


class JobInterrupt(KeyboardInterrupt):
    """Ctrl-C has ended the ranks of a function.

    Attributes:
        report: one line that says so.
        exit_code: 130.
    """

    def __init__(self, error: RankFailedError) -> None:
        super().__init__(error.report)
        self.report, self.exit_code = error.report, error.exit_code


def tell_if_uncaught() -> None:
    """Have the interpreter leave with the report and exit code of such an error, should one come to the very top."""
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
        raise SystemExit(error.exit_code)  # which the interpreter takes from its hook
