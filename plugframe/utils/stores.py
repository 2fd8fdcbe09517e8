"""Keys of a ``torch.distributed`` store that no earlier use of the same store has written."""

from __future__ import annotations

from typing import Any


def fresh_prefix(store: Any, purpose: str, rank: int) -> str:
    """Return a prefix for keys that differs from that of every earlier call with this purpose.

    One store can serve several connections and set-ups, of one process after another. The count of calls is kept in
    the store itself, for each rank, so that no process keeps state. Every rank must call it, equally often.
    """
    turn = store.add(f"plugframe/turns/{purpose}/{rank}", 1)
    return f"plugframe/{purpose}/{turn}"


def fresh_store(store: Any, purpose: str, rank: int) -> Any:
    """Return `store` behind a `fresh_prefix`."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(fresh_prefix(store, purpose, rank), store)
