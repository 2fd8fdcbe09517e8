"""Text from a file or another process, made harmless before a terminal shows it."""

from __future__ import annotations

import re

#: Control characters (C0 and C1, so every escape sequence), marks that turn the direction of text or end a line in
#: disguise, and halves of surrogate pairs, which no terminal can be sent.
_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_HARMFUL_IN_LINE = re.compile(_HARMFUL.pattern[:-1] + "\t\n]")


def printable(text: str, *, one_line: bool = False) -> str:
    """Return `text` with every control character escaped as in a Python string: ``"\\x1b[2J"``.

    Calling it twice changes nothing more.

    Args:
        text: from anywhere.
        one_line: escape newlines and tabs as well, for a cell of a table or a name within a sentence.
    """
    pattern = _HARMFUL_IN_LINE if one_line else _HARMFUL
    return pattern.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def names_text(names: object, *, limit: int = 0) -> str:
    """Return names from a file, joined by commas; of more than `limit` only the first, with how many there are."""
    listed = [printable(str(name), one_line=True) for name in names]  # type: ignore[attr-defined]
    if limit and len(listed) > limit:
        return f"{', '.join(listed[:limit])}, … ({len(listed)} in all)"
    return ", ".join(listed)


def printable_cause(error: BaseException) -> BaseException | None:
    """Return `error` for ``raise … from``; None if its text would reach the terminal raw, in the traceback."""
    seen: BaseException | None = error
    while seen is not None:
        if printable(str(seen)) != str(seen):
            return None
        seen = seen.__cause__ or seen.__context__
    return error
