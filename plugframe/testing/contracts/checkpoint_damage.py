"""Damaged files, files with code, and attempts that must fail, for the checkpoint contract suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from plugframe.testing.contracts.running import broken, one_line


class Code:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def attempt(rule: str, what: str, call: Any, **arguments: Any) -> Any:
    try:
        return call(**arguments)
    except Exception as error:  # noqa: BLE001 - reported as it is
        broken(rule, f"{what} raised {one_line(error)}")


def damaged(whole: bytes, how: str) -> Iterator[tuple[str, bytes | None]]:
    """Yield descriptions of damages and the bytes a file has then; None for no file at all."""
    size = len(whole)
    if how == "missing":
        yield "removed", None
        yield "removed", None
    elif how == "bytes added":
        yield "with 8 bytes added", whole + bytes(8)
        yield "with itself added", whole + whole
    elif how == "the end cut off":
        for keep in dict.fromkeys((0, size // 2, max(size - 8, 0), size - 1)):
            yield f"cut off after {keep} bytes", whole[:keep]
    else:
        for at in dict.fromkeys((0, 1, 9, *(size * part // 16 for part in range(1, 16)), size - 1)):
            if at < size:
                yield f"bit 2 of byte {at} flipped", whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]


def is_file_path(path: str) -> bool:
    return "://" not in path
