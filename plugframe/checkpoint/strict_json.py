"""Parse JSON from an untrusted file: ambiguous input is refused."""

from __future__ import annotations

import json
from typing import Any

#: Maximum digits of an integer in JSON; `encode_scalar` writes at most 20.
_MAX_DIGITS = 40


def parse(data: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: if it is not JSON, has a duplicate key, NaN or Infinity, an integer with too many digits, or is
            nested too deeply.
    """
    text = data.decode("utf-8", "surrogatepass") if isinstance(data, bytes) else data
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {twice[:60]!r}")
    return found


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer has {len(text)} digits")
    return int(text)
