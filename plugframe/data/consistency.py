"""Whether all ranks hold the same data, which `plugframe.data.sharding` divides between them.

Nothing of a dataset is read: a sample may be random, expensive, or open a file that worker processes must open
themselves. Compared are lengths, and what a dataset or sampler keeps in memory for each sample: indices, file names,
labels, tensors.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from plugframe.errors import SettingError
from plugframe.utils.swap import plain_class
from plugframe.utils.tensor_bytes import as_bytes

#: What a loader's data are known by: of each thing a description of its value.
Signature = dict[str, str]

_MANY = 4096
_MAX_BYTES = 4 << 20
_MAX_DEPTH = 4
#: Packages whose datasets divide themselves between ranks, by class.
_DIVIDING = {"streaming": "StreamingDataset", "litdata": "StreamingDataset"}


def divider(loader: DataLoader[Any]) -> str | None:
    """Return what is known to divide the data of a loader between ranks: class of the dataset, and how; None."""
    found = (_divider(part) for part in _parts(loader.dataset))
    what = next((what for what in found if what is not None), None)
    return None if what is None else f"{type(loader.dataset).__name__} is divided between ranks already, by {what}"


def check_undivided(everyone: Sequence[Sequence[str | None]]) -> None:
    """Refuse data that divide themselves on any rank.

    Raises:
        SettingError: on all ranks, naming what divides them.
    """
    for what in (what for found in everyone for what in found if what is not None):
        raise SettingError(
            f"This {what}: dividing it again would lose samples. Call lite.setup_dataloaders(..., "
            "use_distributed_sampler=False), or leave the dividing to it."
        )


def signature(loader: DataLoader[Any], *, deep: bool = True) -> Signature:
    """Return what must be equal on all ranks.

    Args:
        deep: whether to look at what is kept for each sample, or at lengths alone.
    """
    found = {"batch_size": str(loader.batch_size), "drop_last": str(loader.drop_last)}
    dataset = loader.dataset
    name = type(dataset).__name__
    found["class of the dataset"] = name
    length = _length(dataset)
    if length is not None:
        found[f"number of samples of the {name}"] = str(length)
    if isinstance(dataset, IterableDataset):
        return found
    for sampler in _samplers(loader):
        number = _length(sampler)
        if number is not None:
            found[f"length of the {type(sampler).__name__}"] = str(number)
        if deep and not (hasattr(sampler, "rank") and hasattr(sampler, "num_replicas")):
            found.update(_tables(sampler, 0))
    if deep:
        found.update(_tables(dataset, 0))
    return found


def check_same(everyone: Sequence[Sequence[Signature]]) -> None:
    """Compare the signatures of all ranks' loaders, in rank order.

    Raises:
        SettingError: on all ranks, naming the first difference.
    """
    first = everyone[0]
    for rank, others in enumerate(everyone[1:], start=1):
        if len(others) != len(first):
            raise SettingError(
                f"setup_dataloaders() got {len(first)} loaders on rank 0 and {len(others)} on rank {rank}: every rank "
                "sets up the same."
            )
        for number, (mine, other) in enumerate(zip(first, others, strict=True)):
            for what in dict.fromkeys((*mine, *other)):
                if mine.get(what) != other.get(what):
                    raise SettingError(_difference(number, what, rank, mine.get(what), other.get(what)))


def _difference(number: int, what: str, rank: int, mine: str | None, other: str | None) -> str:
    if len(mine or "") < 32 and len(other or "") < 32:
        values = f"{what} is {mine} on rank 0 and {other} on rank {rank}"
    else:  # digests say nothing to people
        values = f"{what} on rank {rank} is not that of rank 0"
    return (
        f"The ranks hold different data, and would read some samples twice and others never: {values} "
        f"(dataloaders[{number}]). Make it alike on every rank: lite.seed_everything(1) before random_split and all "
        "that is drawn, sorted file lists; or set up data that is divided by rank already with "
        "use_distributed_sampler=False."
    )


def _samplers(loader: DataLoader[Any]) -> list[Any]:
    outer = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    inner = getattr(outer, "sampler", None)
    return [each for each in (outer, inner) if each is not None and not isinstance(each, (str, bytes))]


def _length(value: Any) -> int | None:
    if not hasattr(type(value), "__len__"):
        return None
    try:
        return len(value)
    except (TypeError, NotImplementedError):  # a class whose base has one, and that does not know
        return None


def _parts(dataset: Any) -> Iterator[Any]:
    """Yield a dataset and what it reads from: other datasets, stages of a pipeline."""
    seen: set[int] = set()
    todo: list[tuple[Any, int]] = [(dataset, 0)]
    while todo:
        part, depth = todo.pop()
        if id(part) in seen or len(seen) > 256:
            continue
        seen.add(id(part))
        yield part
        if depth < 2 * _MAX_DEPTH:
            todo += [(value, depth + 1) for value in _inside(part)]


def _inside(part: Any) -> Iterator[Any]:
    attributes = getattr(part, "__dict__", None)
    for name, value in (attributes or {}).items():
        if isinstance(value, Dataset) or name in ("dataset", "source_datapipe", "src", "source"):
            yield value
        elif name in ("pipeline", "datasets", "nodesplitter", "stages"):
            yield from value if isinstance(value, (list, tuple)) else (value,)


def _divider(part: Any) -> str | None:
    """Return what divides a dataset between ranks, None if nothing known does."""
    distributed = getattr(part, "_distributed", None)
    if distributed is not None and getattr(distributed, "world_size", 1) > 1:
        return "datasets.distributed.split_dataset_by_node"
    names = {getattr(part, "__name__", ""), type(part).__name__, getattr(getattr(part, "f", None), "__name__", "")}
    if "split_by_node" in names:
        return "split_by_node"
    if "ShardingFilterIterDataPipe" in names:
        return "sharding_filter()"
    for klass in type(part).__mro__:
        package = klass.__module__.partition(".")[0]
        if _DIVIDING.get(package) == klass.__name__:
            return f"{package}.{klass.__name__}"
    return None


# ---------------------------------------------------------------------- what is kept for each sample


def _tables(owner: Any, depth: int) -> Iterator[tuple[str, str]]:
    """Yield a name and a digest of everything that `owner` keeps for each of its samples."""
    number = _length(owner)
    name = plain_class(owner).__name__
    if number is None:
        return
    digest = _digest(owner, number)
    if digest is not None:
        yield name, digest
        return
    if callable(getattr(owner, "with_format", None)) and callable(getattr(owner, "shard", None)):
        yield f"rows of the {name}", _rows(owner, number)
        return
    for attribute, value in list(getattr(owner, "__dict__", {}).items()):
        if attribute == "data_source":  # of torch's samplers: the dataset itself
            continue
        digests = [_digest(each, number) for each in _columns(value)]
        for position, found in enumerate(each for each in digests if each is not None):
            yield f"{name}.{attribute}" + (f"[{position}]" if position else ""), found
        if depth < _MAX_DEPTH:
            for part in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(part, Dataset) and part is not owner:
                    yield from _tables(part, depth + 1)


def _columns(value: Any) -> Iterable[Any]:
    """Return a value, or the tensors and arrays in it: several columns of one table."""
    inside = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(inside, (list, tuple)) and 0 < len(inside) <= 16 and all(_is_array(each) for each in inside):
        return inside
    return (value,)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return isinstance(value, Tensor) or (numpy is not None and isinstance(value, numpy.ndarray))


def _digest(value: Any, number: int) -> str | None:
    """Return a digest of a table with an entry for each of `number` samples; None for anything else."""
    if isinstance(value, range):
        return _hashed([repr(value).encode()]) if len(value) == number else None
    if _is_array(value):
        return _digest_array(value, number)
    if hasattr(value, "iloc") and len(value) == number:
        value = value.iloc[_places(number)].to_numpy().tolist()
        number = len(value)
    if not isinstance(value, (list, tuple)) or len(value) != number:
        return None
    entries = [_plain(value[place]) for place in _places(number)]
    return None if None in entries else _hashed(entry for entry in entries if entry is not None)


def _digest_array(value: Any, number: int) -> str | None:
    if value.ndim == 0 or len(value) != number or not number:
        return None
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.device.type == "meta" or value.is_quantized:
            return None
        places = _places(number, value[0].numel() * value.element_size())
        rows = value.detach()[torch.tensor(places, device=value.device)]
        return _hashed([bytes_of(rows)]) if rows.numel() else None
    if value.dtype.hasobject:
        return _digest(value.tolist(), number)
    return _hashed([value[_places(number, value[0].nbytes)].tobytes()])


def bytes_of(tensor: Tensor) -> bytes:
    """Return the elements of a strided tensor of at least one."""
    flat = tensor.detach().cpu().reshape(-1).contiguous()  # held by name: the bytes live as long as it does
    return bytes(as_bytes(flat))


def _places(number: int, row_bytes: int = 1) -> list[int]:
    """Return the positions that are looked at: all, or many at equal distances."""
    many = max(2, min(_MANY, _MAX_BYTES // max(row_bytes, 1)))
    if number <= many:
        return list(range(number))
    return [place * (number - 1) // (many - 1) for place in range(many)]


def _plain(entry: Any) -> bytes | None:
    """Return what an entry of a list is, if it is plain: the same data may lie in another folder on another node."""
    if isinstance(entry, (str, os.PathLike)):
        return os.path.basename(os.fspath(entry)).encode(errors="replace")
    if isinstance(entry, (bool, int, float, bytes)):
        return repr(entry).encode()
    if isinstance(entry, Tensor) or _is_array(entry):
        digest = _digest_array(entry, len(entry)) if entry.ndim else repr(entry.tolist())
        return None if digest is None else digest.encode()
    if isinstance(entry, (list, tuple)):
        parts = [_plain(part) for part in entry]
        return None if None in parts else b"(" + b",".join(part for part in parts if part is not None) + b")"
    return None


def _rows(dataset: Any, number: int) -> str:
    """Return a digest of the first and last rows of a table that can be read without its transforms."""
    table = dataset.with_format(None)
    return _hashed(repr(table[place]).encode() for place in {0, number // 2, number - 1} if number)


def _hashed(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
