"""Errors that all ranks raise when one of them does: as a code and a text, which any exchange can carry."""

from __future__ import annotations

from collections.abc import Sequence

from plugframe.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointUnfinishedError,
    CheckpointURLError,
)

_CLASSES: dict[str, type[CheckpointError]] = {
    "corrupt": CheckpointCorruptError,
    "unfinished": CheckpointUnfinishedError,
    "mismatch": CheckpointMismatchError,
    "url": CheckpointURLError,
    "error": CheckpointError,
}

#: The code of an error's class and its text; None for no error.
Packed = tuple[str, str] | None


def pack_error(error: CheckpointError | None) -> Packed:
    """Return what `unpack_error` on another rank makes an error of the same class and text of."""
    if error is None:
        return None
    code = next(code for code, cls in _CLASSES.items() if isinstance(error, cls))
    return code, str(error)


def unpack_error(packed: Sequence[str]) -> CheckpointError:
    """Return the error of another rank."""
    code, text = packed
    return _CLASSES.get(code, CheckpointError)(text)


def first_error(
    everyone: Sequence[Sequence[str] | None], mine: CheckpointError | None, rank: int
) -> CheckpointError | None:
    """Return the error of the first rank that has one: on all ranks the same, on that rank the original.

    Args:
        everyone: what `pack_error` gave on each rank.
        mine: this rank's own error.
        rank: this one.
    """
    for number, packed in enumerate(everyone):
        if packed is not None:
            return mine if number == rank and mine is not None else unpack_error(packed)
    return None
