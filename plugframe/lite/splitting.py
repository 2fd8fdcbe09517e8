"""Data that is split between ranks, padded over ranks, or skipped, by hand."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plugframe.adopt import state_of
from plugframe.data.iteration import LoaderState
from plugframe.errors import CollectiveMismatchError, OrderError, SettingError
from plugframe.lite.ordered_tree import walk

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite


def skip_first_batches(lite: Lite, loader: Any, number: int) -> Any:
    """Make the next pass over a loader begin after some batches; see `Lite.skip_first_batches`."""
    lite._started("skip_first_batches")
    state = state_of(loader)
    if not isinstance(state, LoaderState):
        raise OrderError(
            f"skip_first_batches() takes a loader that was set up, and this {type(loader).__name__} was not: call "
            "lite.setup_dataloaders() first."
        )
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise SettingError(f"skip_first_batches({number!r}): it is a number of batches of this rank, 0 or above.")
    if state.resume_from is not None or state.position_loaded:
        raise OrderError(
            "skip_first_batches(): this loader begins at the position of a checkpoint already: lite.load() restores "
            "it, so leave the call out."
        )
    length = len(loader) if hasattr(type(loader.dataset), "__len__") else None
    if length is not None and number > length:
        raise SettingError(f"skip_first_batches({number}): this loader has {length} batches.")
    if number:
        state.resume_from = {"position": number, "origin": 0, "first": 0, "rng": None, "place": None}
    return loader


@contextmanager
def split_between_processes(lite: Lite, data: Any, *, apply_padding: bool) -> Iterator[Any]:
    """Give each rank its part of some data; see `Lite.split_between_processes`."""
    lite._started("split_between_processes")
    index, count = lite._hooks.strategy_data_shard()
    yield _part(data, index, count, apply_padding)


def _part(data: Any, index: int, count: int, padding: bool) -> Any:
    if isinstance(data, Mapping):
        lengths = {key: len(value) for key, value in data.items()}
        if len(set(lengths.values())) > 1:
            raise SettingError(f"split_between_processes(): the values have different lengths: {lengths}.")
        return {key: _part(value, index, count, padding) for key, value in data.items()}
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or isinstance(data, (str, bytes)):
        raise SettingError(
            f"split_between_processes() takes lists, tuples, tensors, arrays and dicts of those, got "
            f"{type(data).__name__}."
        )
    size, more = divmod(len(data), count)
    start = index * size + min(index, more)
    part = data[start : start + size + (index < more)]
    missing = size + (more > 0) - len(part) if padding and len(data) else 0
    if not missing:
        return part
    last = data[len(data) - 1 :]
    if isinstance(data, (list, tuple)):
        return part + last * missing
    tensor = torch.as_tensor(part)
    return torch.cat([tensor, torch.as_tensor(last).expand(missing, *tensor.shape[1:])])


def pad_across_processes(lite: Lite, data: Any, dim: int, pad_index: float, *, pad_first: bool) -> Any:
    """Return tensors padded to the largest size of any rank; see `Lite.pad_across_processes`."""
    lite._started("pad_across_processes")
    lite._job_state.weights.communicated = True
    shapes: dict[str, tuple[int, ...]] = {}
    walk(lambda path, value: shapes.__setitem__(path, tuple(value.shape) if isinstance(value, Tensor) else ()), data)
    everyone = lite._hooks.collective_all_gather_object(obj=shapes, group=None)
    for rank, other in enumerate(everyone):
        if other.keys() != shapes.keys() or any(len(other[path]) != len(shape) for path, shape in shapes.items()):
            raise CollectiveMismatchError(
                f"pad_across_processes(): the data of rank {rank} have another structure: {other} there, {shapes} here."
            )

    def one(path: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not -value.dim() <= dim < value.dim():
            return value
        own, largest = value.shape[dim], max(other[path][dim] for other in everyone)
        if own == largest:
            return value
        shape = list(value.shape)
        shape[dim] = largest - own
        filled = value.new_full(shape, pad_index)
        return torch.cat([filled, value] if pad_first else [value, filled], dim=dim)

    return walk(one, data)


def free_memory(lite: Lite) -> None:
    """Collect garbage, and return cached memory to the device; see `Lite.free_memory`."""
    context = lite._started("free_memory")
    gc.collect()
    empty: Any = getattr(torch.get_device_module(context.device), "empty_cache", None)
    if empty is not None:
        empty()
