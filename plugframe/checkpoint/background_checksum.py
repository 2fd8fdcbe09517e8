"""Checksums taken in another thread while the bytes are written."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from plugframe.checkpoint.manifest import Checksum
from plugframe.utils.tensor_bytes import as_bytes

#: Below this, handing a checksum to another thread costs more than taking it.
_THREAD_FROM_BYTES = 256 * 1024
_MAX_PENDING = 3


class Checksums:
    """The checksums of several parts, piece by piece; a context manager, which ends its thread.

    It has one thread, so the pieces of a part stay in order, and lags a few pieces behind at most, so copies of
    pieces do not pile up. Both the writing and the summing release the interpreter's lock.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Checksum] = {}
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[tuple[Future[None], Tensor]] = deque()

    def __enter__(self) -> Checksums:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def begin(self, name: str) -> None:
        """Open a part; it may stay empty."""
        self._sums[name] = Checksum()

    def add(self, name: str, piece: Tensor) -> memoryview:
        """Sum the next piece of a part, soon, and return its bytes; they stay alive until that is done."""
        data = as_bytes(piece)
        update = self._sums[name].update
        while self._pending and self._pending[0][0].done():
            self._take()
        if not self._pending and len(data) < _THREAD_FROM_BYTES:
            update(data)
            return data
        # `data` is the memory of `piece`, which must live until it has been read.
        self._pending.append((self._pool.submit(update, data), piece))
        if len(self._pending) > _MAX_PENDING:
            self._take()
        return data

    def result(self) -> dict[str, tuple[str, ...]]:
        """Return the checksums of every part; nothing may be added after."""
        while self._pending:
            self._take()
        return {name: checksum.result() for name, checksum in self._sums.items()}

    def _take(self) -> None:
        """Wait for the oldest piece, and only then let go of its memory."""
        self._pending[0][0].result()
        self._pending.popleft()
