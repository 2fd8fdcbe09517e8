"""Return freed host memory to the operating system (``malloc_trim``)."""

from __future__ import annotations

import ctypes
import sys

#: Minimum size of freed temporaries: a trim takes about a millisecond.
_MIN_BYTES = 1024 * 1024


def release_freed(size_bytes: int) -> None:
    """Return free heap memory to the system after temporaries of `size_bytes` on the host were freed.

    glibc caches blocks of up to 32 MiB and cannot reuse them for the next large one between small live blocks.
    Measured: a rank that initialised 96 MiB through temporaries of 16 MiB grew to 230 MiB, and to 112 MiB with this.
    Other C libraries have no such function and do not need it.
    """
    if size_bytes < _MIN_BYTES or not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
