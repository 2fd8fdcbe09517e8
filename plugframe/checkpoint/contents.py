"""What a checkpoint holds, for those who want to look at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What lies at a path.

    Attributes:
        format: the name of its format.
        version: of the format; 0 if it has none.
        size_bytes: of all its files.
        num_files: how many files it has.
        verifiable: whether it has checksums.
        info: plain values about the run that saved it.
        state: what was saved; its tensors are `StoredTensor`, read and verified by nobody yet.
    """

    format: str
    version: int
    size_bytes: int
    num_files: int
    verifiable: bool
    info: Mapping[str, Any]
    state: Mapping[str, Any]
