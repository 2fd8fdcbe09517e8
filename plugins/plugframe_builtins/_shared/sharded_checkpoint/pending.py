"""Background saves."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from plugframe.errors import CheckpointError
from plugframe_builtins._shared.sharded_checkpoint.writer import FolderWriter


def explain(error: BaseException, writer: FolderWriter) -> CheckpointError:
    """Return the error as a `CheckpointError` with the same message on all ranks."""
    if isinstance(error, CheckpointError):
        return error
    if isinstance(error, CheckpointException) and error.failures:
        rank = min(error.failures)
        cause = error.failures[rank][0]
        if isinstance(cause, CheckpointError):
            failure = CheckpointError(str(cause))
        else:
            failure = CheckpointError(_line(writer, cause, f" (rank {rank})"))
        failure.__cause__ = cause
        return failure
    failure = CheckpointError(_line(writer, error, ""))
    failure.__cause__ = error
    return failure


def _line(writer: FolderWriter, error: BaseException, where: str) -> str:
    text = " ".join((str(error) or "no message").split())
    return (
        f"cannot write {writer.shown}{where}: {type(error).__name__}: {text[:500].rstrip('.')}; "
        "what was there before is untouched."
    )


def clean(error: BaseException) -> bool:
    """Return whether all ranks know that the save failed; otherwise another rank may still complete it."""
    return isinstance(error, (CheckpointError, CheckpointException))


def interrupted(error: BaseException) -> bool:
    """Return whether a rank was interrupted from the keyboard."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    return any(isinstance(cause, KeyboardInterrupt) for cause, _ in failures)


class Pending:
    """The handle of a background save; see `SaveHandle`."""

    def __init__(self, future: Future[Any], writer: FolderWriter) -> None:
        self._future = future
        self._writer = writer
        self._lock = threading.Lock()
        self._settled = False
        self._error: CheckpointError | None = None
        self._reported = False

    def wait(self) -> None:
        """Return once the checkpoint is complete on disk; raise if the save failed."""
        error = self._end()
        if error is not None:
            self._reported = True
            raise error

    def done(self) -> bool:
        """Return whether the save has ended, successfully or not."""
        return self._future.done()

    def unreported(self) -> CheckpointError | None:
        """Wait for the end and return the error, unless it was raised already."""
        error = self._end()
        if self._reported:
            return None
        self._reported = error is not None
        return error

    def _end(self) -> CheckpointError | None:
        error = self._future.exception()
        with self._lock:
            if not self._settled:
                self._settled = True
                self._writer.settle(failed=error is not None and clean(error))
                self._error = explain(error, self._writer) if error is not None else None
        return self._error
