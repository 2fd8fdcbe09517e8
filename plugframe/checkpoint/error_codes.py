"""Send errors between ranks as a code and a message, so that all ranks raise the same class."""

from __future__ import annotations

from collections.abc import Sequence

from plugframe.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointKeyError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointUnfinishedError,
    CheckpointURLError,
)

_CLASSES: dict[str, type[CheckpointError]] = {
    "corrupt": CheckpointCorruptError,
    "unfinished": CheckpointUnfinishedError,
    "missing": CheckpointNotFoundError,
    "key": CheckpointKeyError,
    "mismatch": CheckpointMismatchError,
    "url": CheckpointURLError,
    "error": CheckpointError,
}

#: The code of an error's class and its message; None for no error.
Packed = tuple[str, str] | None


def pack_error(error: CheckpointError | None) -> Packed:
    """Return an error in a form that `unpack_error` restores on another rank."""
    if error is None:
        return None
    code = next(code for code, cls in _CLASSES.items() if isinstance(error, cls))
    return code, str(error)


def unpack_error(packed: Sequence[str]) -> CheckpointError:
    """Return the error that was passed to `pack_error`."""
    code, message = packed
    return _CLASSES.get(code, CheckpointError)(message)


def first_error(
    everyone: Sequence[Sequence[str] | None], mine: CheckpointError | None, rank: int
) -> CheckpointError | None:
    """Return the error of the first rank that has one, None if there is none; on that rank the original object.

    Args:
        everyone: results of `pack_error`, by rank.
        mine: this rank's error.
        rank: this rank.
    """
    for number, packed in enumerate(everyone):
        if packed is not None:
            return mine if number == rank and mine is not None else unpack_error(packed)
    return None
