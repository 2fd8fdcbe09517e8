"""Which entry of a saved state belongs to which of a module's own: names that differ by wrappers are one name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.checkpoint.stored import StoredTensor
from plugframe.utils.shards import is_shard

#: What wrappers of torch put between the names of modules: compilation, data parallelism, sharding, and activation
#: checkpointing, whose wrappers call what they hold ``_…_wrapped_module``.
_WRAPPER = re.compile(r"_orig_mod|module|_[a-z]+_wrapped_module")


def match(own: Iterable[Any], saved: Iterable[Any]) -> dict[Any, Any]:
    """Return for each name of `own` the one of `saved` that means it.

    Equal names belong together. Names that are left match if they are equal without the wrappers in them, wherever in
    the path those stand, on either side; unless that could mean more than one.
    """
    mine, theirs = list(own), dict.fromkeys(saved)
    found = {name: name for name in mine if name in theirs}
    rest = [name for name in theirs if name not in found]
    if not rest or len(found) == len(mine):
        return found
    plain_mine, plain_theirs = Counter(map(_plain, mine)), Counter(map(_plain, theirs))
    by_plain = {_plain(name): name for name in rest}
    for name in mine:
        plain = _plain(name)
        if name not in found and plain in by_plain and plain_mine[plain] == plain_theirs[plain] == 1:
            found[name] = by_plain[plain]
    return found


def _plain(name: Any) -> Any:
    if not isinstance(name, str):
        return name
    return ".".join(part for part in name.split(".") if not _WRAPPER.fullmatch(part))


def twins(module: nn.Module, own: Mapping[str, Any]) -> list[list[str]]:
    """Return the names in a module's state that mean one tensor, such as those of tied weights: two or more each."""
    groups: dict[Any, list[str]] = {}
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            groups.setdefault(_memory(tensor), []).append(name)
    known = [[_first(name, own) for name in group] for group in groups.values() if len(group) > 1]
    return [here for group in known if len(here := [name for name in group if name in own]) > 1]


def _first(name: str, own: Mapping[str, Any]) -> str:
    """Return a parameter's name as the state has it, which is without the wrapper of a compiled root."""
    return name if name in own else name.partition(".")[2]


def _memory(tensor: Tensor) -> Any:
    """Return a key that tensors share which are the same values in the same memory."""
    if type(tensor.data) is Tensor and not is_shard(tensor) and not tensor.is_meta and tensor.numel():
        try:
            pointer = tensor.data_ptr()
        except RuntimeError:
            pointer = 0
        if pointer:
            return (pointer, tensor.device, tensor.dtype, tensor.shape, tensor.stride())
    return id(tensor)


def complete(module: nn.Module, own: Mapping[str, Any], found: dict[str, Any]) -> None:
    """Let a name that was not found have the entry of a twin of it that was."""
    for group in twins(module, own):
        source = next((found[name] for name in group if name in found), None)
        if source is not None:
            for name in group:
                found.setdefault(name, source)


def contradictions(module: nn.Module, own: Mapping[str, Any], found: Mapping[str, Any], saved: Any) -> list[str]:
    """Return what a saved state says twice, in two ways, of one tensor of the module."""
    problems = []
    for group in twins(module, own):
        there = [name for name in group if name in found]
        if any(not _equal(saved[found[there[0]]], saved[found[name]]) for name in there[1:]):
            problems.append(f"{' and '.join(there)} are one tensor here, the checkpoint has different values")
    return problems


def _equal(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if not all(isinstance(each, (Tensor, StoredTensor)) for each in (first, second)):
        return True  # neither fits, which is reported for each
    if first.shape != second.shape:
        return True
    if isinstance(first, StoredTensor) and isinstance(second, StoredTensor) and first.name == second.name:
        return True
    values = [each.read() if isinstance(each, StoredTensor) else each for each in (first, second)]
    if values[0].dtype != values[1].dtype:
        values[1] = values[1].to(values[0].dtype)
    # Bit by bit: what is not a number is equal to itself here.
    bits = [value.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for value in values]
    return torch.equal(bits[0], bits[1])
