"""Compare the first window of a stream between ranks: a stream that shards itself would lose samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from plugframe.data.consistency import bytes_of
from plugframe.errors import SettingError
from plugframe.utils.tree import leaves


def window_digest(items: Iterable[Any]) -> str:
    """Return a digest of a window; an empty string if it holds no comparable value.

    Integers and strings are compared (keys, labels, tokens). Only if there are none, floats are: they may be augmented
    by a generator of the stream.
    """
    exact, inexact = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    empty = exact.digest()
    for item in items:
        for leaf in leaves(item):
            is_exact, data = _bytes(leaf)
            if data is not None:
                (exact if is_exact else inexact).update(data)
    for digest in (exact, inexact):
        if digest.digest() != empty:
            return digest.hexdigest()
    return ""


def _bytes(leaf: Any) -> tuple[bool, bytes | None]:
    """Return whether a value is exact, and its bytes; None if it cannot be compared."""
    if isinstance(leaf, Tensor):
        if leaf.device.type == "meta" or leaf.layout is not torch.strided or leaf.is_quantized or not leaf.numel():
            return True, None
        return not (leaf.is_floating_point() or leaf.is_complex()), bytes_of(leaf)
    if isinstance(leaf, (str, bytes, bool, int)):
        return True, repr(leaf).encode()
    if isinstance(leaf, float):
        return False, repr(leaf).encode()
    if hasattr(leaf, "dtype") and hasattr(leaf, "tobytes"):  # a NumPy array
        return leaf.dtype.kind not in "fcO", None if leaf.dtype.hasobject else leaf.tobytes()
    return True, None


def check_first_window(digest: str, key: str, *, store: Any, prefix: str, rank: int, num_ranks: int) -> None:
    """Write the digest of this rank's first window to `store`, and compare all digests if all are written.

    Does not wait: the last of the ranks that read the stream compares.

    Raises:
        SettingError: if they differ.
    """
    key = f"{prefix}/{key}"
    store.set(f"{key}/{rank}", digest)
    keys = [f"{key}/{each}" for each in range(num_ranks)]
    if not store.check(keys):
        return
    # Keys are not deleted: another rank may be reading them, and would wait for a deleted one.
    digests = [store.get(each).decode() for each in keys]
    if len(set(digests)) == 1:
        return
    other = next(each for each in range(num_ranks) if digests[each] != digests[0])
    raise SettingError(
        f"Rank 0 and rank {other} read different samples at the beginning of a stream that setup_dataloaders() divides "
        "between ranks: some would be lost. If it divides itself (by rank, split_by_node), set it up with "
        "use_distributed_sampler=False; if it is shuffled, seed its generator with the same seed on all ranks."
    )
