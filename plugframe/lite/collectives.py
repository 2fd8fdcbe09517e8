"""Collectives over nested data, with the same result shapes for any world size."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from plugframe.errors import CollectiveMismatchError, SettingError
from plugframe.lite.ordered_tree import containers, walk
from plugframe.lite.reductions import reduce_integer, reduce_tensor
from plugframe.utils.movable import move_data
from plugframe.utils.rank_text import ranks_text
from plugframe.utils.tree import map_tensors

#: Python number types; each can represent the preceding ones.
_NUMBERS = (bool, int, float, complex)
_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
#: Characters of what a message says of one rank.
_LONG = 160
_WIDTHS = [kind.__name__ for kind in _NUMBERS]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of nested data that a collective sends.

    Attributes:
        value: a tensor, a Python number, or any other object.
        what: for comparing it over ranks, and for messages: ``"a tensor (2,) float32"``, ``"float"``, ``"object"``.
        error: why it cannot be sent; empty if it can.
    """

    value: Any
    what: str
    error: str = ""


def is_whole(data: Any) -> bool:
    """Return whether `data` is a single tensor, which can be sent without comparing structures first."""
    if not isinstance(data, Tensor) or data.dtype is torch.uint64:
        return False
    return type(data) is Tensor or not hasattr(data, "full_tensor")


def gather(data: Any, hooks: Any, group: Any, device: torch.device, *, sync_grads: bool, pad: float | None) -> Any:
    """Return `data` with each tensor, number and array stacked over ranks, and each other object as a list of them."""
    found = _leaves(data, "all_gather", device, objects=True, what=_shape if pad is None else _dtype)
    leaves = _agreed(found, hooks, group, "all_gather")
    objects = [leaf.value for leaf in leaves.values() if leaf.what == "object"]
    rows = hooks.collective_all_gather_object(obj=objects, group=group) if objects else []
    columns = iter(zip(*rows, strict=True))

    def one(path: str) -> Any:
        leaf = leaves[path]
        if leaf.what == "object":
            return list(next(columns))
        tensor = _tensor(leaf.value, device)
        if pad is not None:
            tensor = padded(tensor, pad, hooks, group)
        return hooks.collective_all_gather(tensor=tensor, group=group, sync_grads=sync_grads)

    return walk(lambda path, value: one(path), data)


def reduce(data: Any, op: str, hooks: Any, group: Any, device: torch.device) -> Any:
    """Return `data` with each tensor, number and array reduced over ranks: tensors in place, where they can be."""
    leaves = _agreed(_leaves(data, "all_reduce", device), hooks, group, "all_reduce")

    def one(path: str, value: Any) -> Any:
        sent = leaves[path].value
        if type(sent) is int:
            return reduce_integer(sent, op, hooks, group, device)
        return reduce_tensor(_tensor(sent, device), op, hooks, group)

    return walk(one, data)


def _shape(tensor: Tensor) -> str:
    return f"a tensor {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _dtype(tensor: Tensor) -> str:
    return f"a tensor of {str(tensor.dtype).removeprefix('torch.')}"


def _leaves(
    data: Any, call: str, device: torch.device, *, objects: bool = False, what: Callable[[Tensor], str] = _shape
) -> dict[str, Leaf]:
    """Return the leaves by path; containers are included, to compare structures."""
    found = {f"{path} ": Leaf(None, text) for path, text in containers(data)}

    def look(path: str, value: Any) -> Any:
        found[path] = _leaf(value, call, device, objects=objects, what=what)
        return value

    walk(look, data)
    return found


def _leaf(value: Any, call: str, device: torch.device, *, objects: bool, what: Callable[[Tensor], str]) -> Leaf:
    if isinstance(value, Tensor):
        return Leaf(value, what(value), _spread(value, call) or ("" if objects else _without_reductions(value)))
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        with suppress(TypeError):  # strings, dates, objects, or dtypes that torch does not support
            made = torch.tensor(value)  # a copy, so that an in-place reduction leaves the user's array unchanged
            return Leaf(_on(made, device), what(made), "" if objects else _without_reductions(made))
    elif isinstance(value, _NUMBERS):
        kind: Any = next(kind for kind in _NUMBERS if isinstance(value, kind))
        number: Any = value
        if kind is int and not -(1 << 63) <= number < 1 << 63:
            return Leaf(value, "int", f"{call}() takes integers of 64 bits, got {value!r}: pass a float.")
        return Leaf(kind(number), kind.__name__)
    if objects:
        return Leaf(value, "object")
    return Leaf(
        value,
        f"a {type(value).__name__}",
        f"{call}() takes tensors, numbers, arrays, and dicts, lists and tuples of them, got {type(value).__name__}; "
        "for other objects use lite.all_gather() or lite.broadcast().",
    )


def _spread(tensor: Tensor, call: str) -> str:
    """Return why a sharded tensor cannot be sent, ``""`` for any other."""
    if not hasattr(tensor, "full_tensor"):
        return ""
    return (
        f"{call}() got a {type(tensor).__name__}, which is sharded over the ranks: pass .full_tensor(), or "
        ".to_local() for the part."
    )


def _without_reductions(tensor: Tensor) -> str:
    """Return why torch cannot reduce a tensor, ``""`` if it can."""
    if tensor.dtype is not torch.uint64:
        return ""
    return "all_reduce() does not take torch.uint64: convert the tensor with .to(torch.int64) first."


def _agreed(leaves: dict[str, Leaf], hooks: Any, group: Any, call: str) -> dict[str, Leaf]:
    """Compare paths and types over ranks; return `leaves`, with Python numbers promoted to a common type.

    Raises:
        SettingError: for what cannot be sent; ranks that could send theirs get a `CollectiveMismatchError`.
        CollectiveMismatchError: on all ranks, with the first keys or values that differ.
    """
    mine = {path: f"{leaf.what} (refused)" if leaf.error else leaf.what for path, leaf in leaves.items()}
    digest = hashlib.blake2b(repr(sorted(mine.items())).encode(), digest_size=16).hexdigest()
    digests = hooks.collective_all_gather_object(obj=digest, group=group)
    everyone = [mine]
    if any(each != digest for each in digests):
        everyone = hooks.collective_all_gather_object(obj=mine, group=group)
    error = next((leaf.error for leaf in leaves.values() if leaf.error), "")
    if error:
        raise SettingError(error)
    places = dict.fromkeys(path for each in everyone for path in each)
    texts = {path: [each.get(path, "") for each in everyone] for path in places}
    unequal = {path: each for path, each in texts.items() if len(set(each)) > 1}
    widest = {path: max(each, key=_WIDTHS.index) for path, each in unequal.items() if set(each) <= set(_WIDTHS)}
    different = {path: each for path, each in unequal.items() if path not in widest}
    if different:
        raise CollectiveMismatchError(_difference(different, group, call))
    kinds: dict[str, Any] = dict(zip(_WIDTHS, _NUMBERS, strict=True))
    return {**leaves, **{path: Leaf(kinds[name](leaves[path].value), name) for path, name in widest.items()}}


def _difference(different: Mapping[str, Sequence[str]], group: Any, call: str) -> str:
    # Report the shortest difference: a mapping is shown with all its keys.
    short = (path for path, texts in different.items() if max(map(len, texts)) < _LONG)
    path = next(short, next(iter(different)))
    holders: dict[str, list[int]] = {}
    for rank, text in zip(_members(group, len(different[path])), different[path], strict=True):
        holders.setdefault(text or "not there", []).append(rank)
    found = "; ".join(f"{text} on {ranks_text(members)}" for text, members in holders.items())
    return (
        f"The ranks do not pass the same data to {call}(): data{path.strip()} is {found}. Pass the same keys, "
        "lengths and types on every rank."
    )


def _members(group: Any, size: int) -> Sequence[int]:
    """Return the global ranks of a group."""
    if isinstance(group, (list, tuple)):
        return group
    if group is None:
        return range(size)
    return torch.distributed.get_process_group_ranks(group)


def _tensor(value: Any, device: torch.device) -> Tensor:
    """Return a number as a 0-d tensor on `device`; tensors stay where they are."""
    return value if isinstance(value, Tensor) else _on(torch.tensor(value, dtype=_DTYPES[type(value)]), device)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`, unchanged if the device lacks its dtype (Apple's GPUs have no float64)."""
    try:
        return tensor.to(device)
    except TypeError:
        return tensor


def padded(tensor: Tensor, value: float, hooks: Any, group: Any) -> Tensor:
    """Return `tensor` padded with `value` to the largest shape of any rank of the group.

    Raises:
        CollectiveMismatchError: on all ranks, if they have different numbers of dimensions.
    """
    shapes = hooks.collective_all_gather_object(obj=tuple(tensor.shape), group=group)
    if len({len(shape) for shape in shapes}) > 1:
        raise CollectiveMismatchError(
            f"all_gather(pad=…) fills up tensors of as many dimensions, got shapes {', '.join(map(str, shapes))}."
        )
    missing = [max(sizes) - own for *sizes, own in zip(*shapes, tensor.shape, strict=True)]
    pairs = [part for size in reversed(missing) for part in (0, size)]
    return torch.nn.functional.pad(tensor, pairs, value=value) if any(missing) else tensor


class _Unsendable:
    """Defers an error of preparing an object to pickling, where the collective reports it to the other ranks."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


def off_device(data: Any) -> Any:
    """Return `data` with its tensors on the CPU, to be sent as an object; defer errors to pickling."""

    def one(tensor: Tensor) -> Tensor:
        error = _spread(tensor, "broadcast")
        if error:
            raise SettingError(error)
        return tensor.detach().cpu()

    try:
        return map_tensors(one, data)
    except Exception as error:  # noqa: BLE001 - the other ranks wait to be told, whatever it is
        return _Unsendable(error)


def on_device(data: Any, device: torch.device) -> Any:
    """Return `data` with its tensors on `device`."""
    if isinstance(data, _Unsendable):  # a collective of one rank pickles nothing
        raise data.error
    return move_data(data, device)
