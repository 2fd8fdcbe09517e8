"""Match the names in a saved state to those of a module: names that differ only by wrappers are equal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.checkpoint.stored import StoredTensor
from plugframe.utils.shards import is_shard

#: Components that torch's wrappers add to names: compilation, data parallelism, and sharding and activation
#: checkpointing, which name the inner module ``_…_wrapped_module``.
_WRAPPER = re.compile(r"_orig_mod|module|_[a-z]+_wrapped_module")


def match(own: Iterable[Any], saved: Iterable[Any]) -> dict[Any, Any]:
    """Return the matching name in `saved` for each name in `own` that has one.

    Equal names match. Others match if they are equal without wrapper components, anywhere in the path and on either
    side, unless several names are then equal.
    """
    mine, theirs = list(own), dict.fromkeys(saved)
    found = {name: name for name in mine if name in theirs}
    rest = [name for name in theirs if name not in found]
    if not rest or len(found) == len(mine):
        return found
    count_mine, count_theirs = Counter(map(_unwrapped, mine)), Counter(map(_unwrapped, theirs))
    by_unwrapped = {_unwrapped(name): name for name in rest}
    for name in mine:
        unwrapped = _unwrapped(name)
        if name not in found and unwrapped in by_unwrapped and count_mine[unwrapped] == count_theirs[unwrapped] == 1:
            found[name] = by_unwrapped[unwrapped]
    return found


def _unwrapped(name: Any) -> Any:
    if not isinstance(name, str):
        return name
    return ".".join(part for part in name.split(".") if not _WRAPPER.fullmatch(part))


def tied_names(module: nn.Module, own: Mapping[str, Any]) -> list[list[str]]:
    """Return the groups of names in a module's state that refer to one tensor, such as tied weights."""
    groups: dict[Any, list[str]] = {}
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            groups.setdefault(_memory_key(tensor), []).append(name)
    known = [[_first(name, own) for name in group] for group in groups.values() if len(group) > 1]
    return [here for group in known if len(here := [name for name in group if name in own]) > 1]


def _first(name: str, own: Mapping[str, Any]) -> str:
    """Return a parameter's name as in the state, which has no prefix of a compiled root."""
    return name if name in own else name.partition(".")[2]


def _memory_key(tensor: Tensor) -> Any:
    """Return a key that is equal for tensors of the same memory, dtype, shape and strides."""
    if type(tensor.data) is Tensor and not is_shard(tensor) and not tensor.is_meta and tensor.numel():
        try:
            pointer = tensor.data_ptr()
        except RuntimeError:
            pointer = 0
        if pointer:
            return (pointer, tensor.device, tensor.dtype, tensor.shape, tensor.stride())
    return id(tensor)


def fill_tied(module: nn.Module, own: Mapping[str, Any], found: dict[str, Any]) -> None:
    """Match names without an entry to the entry of a tied name."""
    for group in tied_names(module, own):
        source = next((found[name] for name in group if name in found), None)
        if source is not None:
            for name in group:
                found.setdefault(name, source)


def contradictions(module: nn.Module, own: Mapping[str, Any], found: Mapping[str, Any], saved: Any) -> list[str]:
    """Return a message for each tensor of the module for which a saved state has two different values."""
    problems = []
    for group in tied_names(module, own):
        names = [name for name in group if name in found]
        if any(not _equal(saved[found[names[0]]], saved[found[name]]) for name in names[1:]):
            problems.append(f"{' and '.join(names)} are one tensor here, the checkpoint has different values")
    return problems


def _equal(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if not all(isinstance(each, (Tensor, StoredTensor)) for each in (first, second)):
        return True  # reported separately as a mismatch
    if first.shape != second.shape:
        return True
    if isinstance(first, StoredTensor) and isinstance(second, StoredTensor) and first.name == second.name:
        return True
    values = [each.read() if isinstance(each, StoredTensor) else each for each in (first, second)]
    if values[0].dtype != values[1].dtype:
        values[1] = values[1].to(values[0].dtype)
    # Bitwise, so that a NaN equals itself.
    bits = [value.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for value in values]
    return torch.equal(bits[0], bits[1])
