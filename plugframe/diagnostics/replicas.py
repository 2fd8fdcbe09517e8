"""Check that parameters and optimizer state are equal on all ranks, by a hash per tensor."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.errors import OutOfSyncError, UnsupportedError
from plugframe.utils.rank_text import ranks_text
from plugframe.utils.tensor_bytes import as_bytes

#: Number of elements hashed at a time on a device.
_CHUNK = 1 << 20
_MASK = (1 << 63) - 1

Named = tuple[str, Tensor]


def named_tensors(modules: Iterable[nn.Module], optimizers: Iterable[Optimizer]) -> Iterator[Named]:
    """Yield every parameter by name, then the state of every optimizer, in the same order on every rank."""
    names: dict[int, str] = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            names[id(parameter)] = name
            yield f"parameter {name!r}", parameter
    for optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            name = names.get(id(parameter), str(number))
            for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                if isinstance(value, Tensor):
                    yield f"{key!r} of {name!r} in {type(optimizer).__name__}", value


def check_in_sync(named: Callable[[], Iterable[Named]], hooks: Any, when: str = "") -> None:
    """Compare tensors bitwise across ranks, by a hash of each. Every rank must call it.

    Args:
        named: returns the tensors of this rank.
        when: suffix for the message: ``" after step 100"``.

    Raises:
        OutOfSyncError: on all ranks, with the first tensor that differs.
    """
    lists = _compare(named, hooks)
    if lists and not _same_names(lists):
        # Deleted models are still there where garbage was not collected yet: ranks collect at different times.
        gc.collect()
        lists = _compare(named, hooks)
    if lists:
        raise OutOfSyncError(f"The ranks are out of sync{when}: {_difference(lists)}")


def _compare(named: Callable[[], Iterable[Named]], hooks: Any) -> Sequence[list[tuple[str, int]]]:
    """Return name and hash of the tensors of each rank; empty if all are equal."""
    found = list(named())
    hashes = tensor_hashes([tensor for _, tensor in found])
    pairs = [(name, each) for (name, _), each in zip(found, hashes, strict=True)]
    mine = xxhash.xxh3_64_intdigest(repr(pairs).encode()) & _MASK
    # Compare one hash of everything first; the lists are gathered only if it differs.
    all_hashes = hooks.collective_all_gather(tensor=torch.tensor([mine]), group=None, sync_grads=False)
    if bool((all_hashes == all_hashes[0]).all()):
        return ()
    gathered: Sequence[list[tuple[str, int]]] = hooks.collective_all_gather_object(obj=pairs, group=None)
    return gathered


def _same_names(lists: Sequence[Sequence[tuple[str, int]]]) -> bool:
    names = [[name for name, _ in each] for each in lists]
    return all(each == names[0] for each in names)


def check_replicated(provides: Iterable[str], call: str) -> None:
    """Raise for a strategy that shards the model.

    Raises:
        UnsupportedError: if `provides` contains ``"sharded"``.
    """
    if "sharded" in provides:
        raise UnsupportedError(
            f"{call} compares replicated parameters, and this strategy shards the model: there is nothing to compare. "
            "Remove it."
        )


def tensor_hashes(tensors: Sequence[Tensor]) -> list[int]:
    """Return a hash of bits, shape and dtype for each tensor, with one synchronisation per device."""
    on_device: dict[int, Tensor] = {}
    found: dict[int, int] = {}
    for number, tensor in enumerate(tensors):
        data = tensor.detach()
        seed = f"{tuple(data.shape)} {data.dtype}"
        if data.device.type == "cpu":
            hasher = xxhash.xxh3_64(seed.encode())
            hasher.update(as_bytes(data.contiguous()))
            found[number] = hasher.intdigest() & _MASK
        else:
            on_device[number] = _sum_of_bits(data)
            found[number] = xxhash.xxh3_64_intdigest(seed.encode()) & _MASK
    if on_device:
        values = torch.stack(list(on_device.values())).tolist()
        for number, value in zip(on_device, values, strict=True):
            found[number] ^= value & _MASK
    return [found[number] for number in range(len(tensors))]


def _sum_of_bits(data: Tensor) -> Tensor:
    """Return a 0-d int64 tensor: the bits as integers, each times a factor of its position, summed with wrap-around."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(data.element_size(), torch.int64)
    flat = (torch.view_as_real(data.resolve_conj()) if data.is_complex() else data).contiguous().view(width).view(-1)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    factors = torch.arange(1, min(_CHUNK, flat.numel()) + 1, device=data.device) * 0x9E3779B97F4A7C1 + 1
    for number, chunk in enumerate(torch.split(flat, _CHUNK)):
        total += (chunk.to(torch.int64) * factors[: chunk.numel()]).sum() * (2 * number + 1)
    return total


def _difference(lists: Sequence[Sequence[tuple[str, int]]]) -> str:
    if not _same_names(lists):
        counts = ", ".join(f"{len(each)} tensors on rank {rank}" for rank, each in enumerate(lists))
        return f"they have different parameters or state ({counts})."
    different = [place for place, rows in enumerate(zip(*lists, strict=True)) if len({value for _, value in rows}) > 1]
    first = different[0]
    ranks_by_hash: dict[int, list[int]] = {}
    for rank, each in enumerate(lists):
        ranks_by_hash.setdefault(each[first][1], []).append(rank)
    most = max(ranks_by_hash.values(), key=len)
    others = sorted(rank for ranks in ranks_by_hash.values() if ranks is not most for rank in ranks)
    more = f"; {len(different) - 1} of the other {len(lists[0]) - 1} tensors differ too" if len(different) > 1 else ""
    where = f"between {ranks_text(others)} and {ranks_text(most)}"
    return f"the first difference is in {lists[0][first][0]}, {where}{more}."
