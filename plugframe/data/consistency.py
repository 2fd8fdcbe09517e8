"""Verify that all ranks hold the same data, before `plugframe.data.sharding` divides it between them.

No sample is read: it may be random, expensive, or open a file that worker processes must open themselves. Lengths are
compared, and what a dataset or sampler stores in memory per sample: indices, file names, labels, tensors.
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

#: A description of each property of a loader's data, by name.
Signature = dict[str, str]

#: Limits per table: rows compared, bytes compared, and depth of nested datasets.
_MAX_ROWS = 4096
_MAX_BYTES = 4 << 20
_MAX_DEPTH = 4
#: Classes of datasets that shard themselves, by package.
_SELF_SHARDING = {"streaming": "StreamingDataset", "litdata": "StreamingDataset"}


def existing_sharding(loader: DataLoader[Any]) -> str | None:
    """Return a sentence on how the data of a loader is sharded already, None if it is not known to be."""
    found = (_sharding_of(each) for each in _nested_datasets(loader.dataset))
    how = next((how for how in found if how is not None), None)
    return None if how is None else f"{type(loader.dataset).__name__} is divided between ranks already, by {how}"


def check_unsharded(everyone: Sequence[Sequence[str | None]]) -> None:
    """Raise if the data of a loader is sharded already on any rank.

    Raises:
        SettingError: on all ranks.
    """
    for what in (what for found in everyone for what in found if what is not None):
        raise SettingError(
            f"This {what}: dividing it again would lose samples. Call lite.setup_dataloaders(..., "
            "use_distributed_sampler=False), or remove that sharding."
        )


def signature(loader: DataLoader[Any], *, deep: bool = True) -> Signature:
    """Return the properties that must be equal on all ranks.

    Args:
        deep: whether to include digests of per-sample data, or lengths only.
    """
    found = {"batch_size": str(loader.batch_size), "drop_last": str(loader.drop_last)}
    dataset = loader.dataset
    name = type(dataset).__name__
    found["class of the dataset"] = name
    length = _length(dataset)
    if length is not None:
        found[f"number of samples of the {name}"] = str(length)
    if isinstance(dataset, IterableDataset):
        states = [repr(generator.bit_generator.state).encode() for generator in _shuffles(dataset)]
        if states:
            found[f"the generator of the shuffled {name} (pass a seed: stream.shuffle(seed=1))"] = _hashed(states)
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


def _shuffles(stream: Any) -> Iterator[Any]:
    """Yield the generators that a stream of Hugging Face's ``datasets`` is shuffled with, along its stages."""
    stages, seen = [stream], 0
    while stages and seen < 256:
        stage, seen = stages.pop(), seen + 1
        generator = getattr(stage, "generator", None)
        if hasattr(generator, "bit_generator"):
            yield generator
        held = getattr(stage, "__dict__", {})
        inside = [held.get(name) for name in ("_shuffling", "_ex_iterable", "ex_iterable", "ex_iterables")]
        for each in inside:
            stages += each if isinstance(each, (list, tuple)) else [] if each is None else [each]


def check_consistent(everyone: Sequence[Sequence[Signature]]) -> None:
    """Compare the signatures of all ranks' loaders, in rank order.

    Raises:
        SettingError: on all ranks, with the first difference.
    """
    first = everyone[0]
    for rank, others in enumerate(everyone[1:], start=1):
        if len(others) != len(first):
            raise SettingError(
                f"setup_dataloaders() got {len(first)} loaders on rank 0 and {len(others)} on rank {rank}: pass the "
                "same loaders on every rank."
            )
        for number, (mine, other) in enumerate(zip(first, others, strict=True)):
            for what in dict.fromkeys((*mine, *other)):
                if mine.get(what) != other.get(what):
                    raise SettingError(_difference(number, what, rank, mine.get(what), other.get(what)))


def _difference(number: int, what: str, rank: int, mine: str | None, other: str | None) -> str:
    if len(mine or "") < 32 and len(other or "") < 32:
        values = f"{what} is {mine} on rank 0 and {other} on rank {rank}"
    else:  # digests are not readable
        values = f"{what} on rank {rank} is not that of rank 0"
    return (
        f"The ranks hold different data, and would read some samples twice and others never: {values} "
        f"(dataloaders[{number}]). Make the data equal: sort lists of files, and call lite.seed_everything(1) before "
        "random_split and other draws. If it is divided by rank already, pass use_distributed_sampler=False."
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
    except (TypeError, NotImplementedError):  # inherited __len__ of a class without a length
        return None


def _nested_datasets(dataset: Any) -> Iterator[Any]:
    """Yield a dataset and its sources: other datasets, stages of a pipeline."""
    seen: set[int] = set()
    stack: list[tuple[Any, int]] = [(dataset, 0)]
    while stack:
        each, depth = stack.pop()
        if id(each) in seen or len(seen) > 256:
            continue
        seen.add(id(each))
        yield each
        if depth < 2 * _MAX_DEPTH:
            stack += [(value, depth + 1) for value in _sources(each)]


def _sources(dataset: Any) -> Iterator[Any]:
    attributes = getattr(dataset, "__dict__", None)
    for name, value in (attributes or {}).items():
        if isinstance(value, Dataset) or name in ("dataset", "source_datapipe", "src", "source"):
            yield value
        elif name.startswith("pipe") or name in ("datasets", "nodesplitter", "stages"):
            yield from value if isinstance(value, (list, tuple)) else (value,)


def _sharding_of(dataset: Any) -> str | None:
    """Return how a dataset is sharded between ranks, None if it is not known to be."""
    distributed = getattr(dataset, "_distributed", None)
    if distributed is not None and getattr(distributed, "world_size", 1) > 1:
        return "datasets.distributed.split_dataset_by_node"
    inner = getattr(dataset, "f", None)
    names = {getattr(dataset, "__name__", ""), type(dataset).__name__, getattr(inner, "__name__", "")}
    if "split_by_node" in names:
        return "split_by_node"
    if "ShardingFilterIterDataPipe" in names:
        return "sharding_filter()"
    for klass in type(dataset).__mro__:
        package = klass.__module__.partition(".")[0]
        if _SELF_SHARDING.get(package) == klass.__name__:
            return f"{package}.{klass.__name__}"
    return None


# ---------------------------------------------------------------------- per-sample data


def _tables(owner: Any, depth: int) -> Iterator[tuple[str, str]]:
    """Yield the name and digest of each attribute of `owner` with one entry per sample."""
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
        if attribute == "data_source":  # the dataset itself, in torch's samplers
            continue
        digests = [_digest(each, number) for each in _columns(value)]
        for position, found in enumerate(each for each in digests if each is not None):
            yield f"{name}.{attribute}" + (f"[{position}]" if position else ""), found
        if depth < _MAX_DEPTH:
            for part in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(part, Dataset) and part is not owner:
                    yield from _tables(part, depth + 1)


def _columns(value: Any) -> Iterable[Any]:
    """Return the tensors and arrays in a container, as columns of one table; else the value itself."""
    inside = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(inside, (list, tuple)) and 0 < len(inside) <= 16 and all(_is_array(each) for each in inside):
        return inside
    return (value,)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return isinstance(value, Tensor) or (numpy is not None and isinstance(value, numpy.ndarray))


def _digest(value: Any, number: int) -> str | None:
    """Return a digest of a table with one entry for each of `number` samples; None for anything else."""
    if isinstance(value, range):
        return _hashed([repr(value).encode()]) if len(value) == number else None
    if _is_array(value):
        return _digest_array(value, number)
    if hasattr(value, "iloc") and len(value) == number:
        value = value.iloc[_rows_compared(number)].to_numpy().tolist()
        number = len(value)
    if not isinstance(value, (list, tuple)) or len(value) != number:
        return None
    entries = [_entry_bytes(value[row]) for row in _rows_compared(number)]
    return None if None in entries else _hashed(entry for entry in entries if entry is not None)


def _digest_array(value: Any, number: int) -> str | None:
    if value.ndim == 0 or len(value) != number or not number:
        return None
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.device.type == "meta" or value.is_quantized:
            return None
        indices = _rows_compared(number, value[0].numel() * value.element_size())
        rows = value.detach()[torch.tensor(indices, device=value.device)]
        return _hashed([bytes_of(rows)]) if rows.numel() else None
    if value.dtype.hasobject:
        return _digest(value.tolist(), number)
    return _hashed([value[_rows_compared(number, value[0].nbytes)].tobytes()])


def bytes_of(tensor: Tensor) -> bytes:
    """Return the bytes of a strided tensor with at least one element."""
    flat = tensor.detach().cpu().reshape(-1).contiguous()  # a variable, since as_bytes() does not keep it alive
    return bytes(as_bytes(flat))


def _rows_compared(number: int, row_bytes: int = 1) -> list[int]:
    """Return the indices of the rows to compare: all, or up to the limits at equal distances."""
    limit = max(2, min(_MAX_ROWS, _MAX_BYTES // max(row_bytes, 1)))
    if number <= limit:
        return list(range(number))
    return [index * (number - 1) // (limit - 1) for index in range(limit)]


def _entry_bytes(entry: Any) -> bytes | None:
    """Return the bytes of a plain entry, None for others; of a path the last component, as folders differ by node."""
    if isinstance(entry, (str, os.PathLike)):
        return os.path.basename(os.fspath(entry)).encode(errors="replace")
    if isinstance(entry, (bool, int, float, bytes)):
        return repr(entry).encode()
    if isinstance(entry, Tensor) or _is_array(entry):
        digest = _digest_array(entry, len(entry)) if entry.ndim else repr(entry.tolist())
        return None if digest is None else digest.encode()
    if isinstance(entry, (list, tuple)):
        items = [_entry_bytes(item) for item in entry]
        return None if None in items else b"(" + b",".join(item for item in items if item is not None) + b")"
    return None


def _rows(dataset: Any, number: int) -> str:
    """Return a digest of the first, middle and last row of a Hugging Face dataset, read without its transforms."""
    table = dataset.with_format(None)
    return _hashed(repr(table[index]).encode() for index in {0, number // 2, number - 1} if number)


def _hashed(chunks: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        digest.update(len(chunk).to_bytes(8, "little"))
        digest.update(chunk)
    return digest.hexdigest()
