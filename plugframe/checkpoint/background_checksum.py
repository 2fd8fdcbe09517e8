"""Compute checksums in a background thread while the bytes are written."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from plugframe.checkpoint.manifest import Checksum
from plugframe.utils.tensor_bytes import as_bytes

#: Below this size, passing a chunk to another thread costs more than its checksum.
_THREAD_FROM_BYTES = 256 * 1024
_MAX_PENDING = 3


class Checksums:
    """Computes the checksums of several parts from their pieces; a context manager that ends its thread.

    There is one thread, so the pieces of a part stay in order, and at most a few pieces are pending, so that copies do
    not accumulate. Both writing and hashing release the GIL.
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
        """Begin a part, which may stay empty."""
        self._sums[name] = Checksum()

    def add(self, name: str, piece: Tensor) -> memoryview:
        """Schedule the checksum of the next piece of a part, and return its bytes, kept alive until then."""
        data = as_bytes(piece)
        update = self._sums[name].update
        while self._pending and self._pending[0][0].done():
            self._wait_for_oldest()
        if not self._pending and len(data) < _THREAD_FROM_BYTES:
            update(data)
            return data
        # `data` is a view of the memory of `piece`, which must stay alive until it is hashed.
        self._pending.append((self._pool.submit(update, data), piece))
        if len(self._pending) > _MAX_PENDING:
            self._wait_for_oldest()
        return data

    def result(self) -> dict[str, tuple[str, ...]]:
        """Wait, and return the checksums of every part; nothing may be added afterwards."""
        while self._pending:
            self._wait_for_oldest()
        return {name: checksum.result() for name, checksum in self._sums.items()}

    def _wait_for_oldest(self) -> None:
        """Wait for the oldest piece, then release its memory."""
        self._pending[0][0].result()
        self._pending.popleft()
