"""JSON from a file that nobody vouches for: what two readers could read in two ways is refused."""

from __future__ import annotations

import json
from typing import Any

#: Digits of an integer in JSON; what `encode_scalar` writes has 20 at most.
_MAX_DIGITS = 40


def parse(data: bytes | str) -> Any:
    """Return what JSON says.

    Raises:
        ValueError: for what is no JSON, names one key twice, has a number that JSON has not (NaN, Infinity), an
            integer of more digits than any size has, or is nested beyond measure.
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
        raise ValueError(f"the key {twice[:60]!r} is there twice")
    return found


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer has {len(text)} digits")
    return int(text)
