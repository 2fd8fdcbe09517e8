"""The first window of a stream, which all ranks must see alike: one that divides itself would lose samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from plugframe.data.consistency import bytes_of
from plugframe.errors import SettingError
from plugframe.utils.tree import leaves


def digest_of(items: Iterable[Any]) -> str:
    """Return what a window is known by; an empty text if nothing in it can be compared.

    Whole numbers and texts count (keys, labels, tokens), and only if there are none numbers with a fraction: those
    may be augmented by a generator that nobody but the stream knows.
    """
    exact, inexact = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    empty = exact.digest()
    for item in items:
        for leaf in leaves(item):
            kind, data = _bytes(leaf)
            if data is not None:
                (exact if kind else inexact).update(data)
    for digest in (exact, inexact):
        if digest.digest() != empty:
            return digest.hexdigest()
    return ""


def _bytes(leaf: Any) -> tuple[bool, bytes | None]:
    """Return whether a value is exact, and what it is."""
    if isinstance(leaf, Tensor):
        if leaf.device.type == "meta" or leaf.layout is not torch.strided or leaf.is_quantized or not leaf.numel():
            return True, None
        return not (leaf.is_floating_point() or leaf.is_complex()), bytes_of(leaf)
    if isinstance(leaf, (str, bytes, bool, int)):
        return True, repr(leaf).encode()
    if isinstance(leaf, float):
        return False, repr(leaf).encode()
    if hasattr(leaf, "dtype") and hasattr(leaf, "tobytes"):  # an array of NumPy's
        return leaf.dtype.kind not in "fcO", None if leaf.dtype.hasobject else leaf.tobytes()
    return True, None


def check_window(digest: str, key: str, *, store: Any, prefix: str, rank: int, num_ranks: int) -> None:
    """Leave word of this rank's first window, and compare those of all ranks if all have left word.

    Nobody waits: of ranks that read one stream the last one sees all others.

    Raises:
        SettingError: if they differ.
    """
    key = f"{prefix}/{key}"
    store.set(f"{key}/{rank}", digest)
    keys = [f"{key}/{each}" for each in range(num_ranks)]
    if not store.check(keys):
        return
    # The keys stay: another rank may read them at this moment, and would wait for one that was deleted.
    seen = [store.get(each).decode() for each in keys]
    if len(set(seen)) == 1:
        return
    other = next(each for each in range(num_ranks) if seen[each] != seen[0])
    raise SettingError(
        f"Rank 0 and rank {other} read different samples at the beginning of a stream that setup_dataloaders() divides "
        "between ranks: some would be lost. If it divides itself (by rank, split_by_node), set it up with "
        "use_distributed_sampler=False; if it is shuffled, seed its generator alike on all ranks."
    )
