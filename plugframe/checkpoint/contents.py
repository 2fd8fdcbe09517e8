"""The contents of a checkpoint, for inspection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The contents of a checkpoint.

    Attributes:
        format: name of the format.
        version: version of the format; 0 if it has none.
        size_bytes: total size of its files.
        num_files: number of files.
        verifiable: whether it has checksums.
        info: plain values about the run that saved it.
        state: the saved state; its tensors are `StoredTensor`, neither read nor verified yet.
    """

    format: str
    version: int
    size_bytes: int
    num_files: int
    verifiable: bool
    info: Mapping[str, Any]
    state: Mapping[str, Any]
