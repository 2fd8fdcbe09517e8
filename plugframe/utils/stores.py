"""Unused key prefixes in a ``torch.distributed`` store."""

from __future__ import annotations

from typing import Any


def fresh_prefix(store: Any, purpose: str, rank: int) -> str:
    """Return a key prefix that no earlier call with this `purpose` has returned.

    One store can serve several connections and setups of successive processes, so the number of calls is counted in
    the store, per rank. Every rank must call it equally often.
    """
    count = store.add(f"plugframe/turns/{purpose}/{rank}", 1)
    return f"plugframe/{purpose}/{count}"


def fresh_store(store: Any, purpose: str, rank: int) -> Any:
    """Return `store` with a `fresh_prefix`."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(fresh_prefix(store, purpose, rank), store)
