"""Cut a batch into micro-batches along the first dimension, and put results together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plugframe.base import map_tensors
from plugframe.errors import UnsupportedError
from plugframe_builtins.pipeline.stand_in import tensors_of

#: Arguments and results beside tensors.
PLAIN = (str, int, float, complex, bool, type(None), torch.dtype, torch.device)


class Micro(NamedTuple):
    """Micro-batches of one call.

    Attributes:
        calls: positional and keyword arguments of each.
        size: samples of each, 0 if the call takes no batch.
    """

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    size: int


def cut_batch(args: tuple[Any, ...], kwargs: dict[str, Any], most: int) -> Micro:
    """Return the call cut into equal micro-batches, as many as divide the batch and at most `most`.

    Raises:
        UnsupportedError: for a tensor that is neither per sample nor a single value.
    """
    tensors = [tensor for tensor in tensors_of((args, kwargs)) if tensor.dim()]
    if not tensors:
        return Micro([(args, kwargs)], 0)
    batch = tensors[0].shape[0]
    for tensor in tensors:
        if tensor.shape[0] not in (1, batch):
            raise UnsupportedError(
                f"The model is called with tensors of {batch} and of {tensor.shape[0]} rows (shape "
                f"{tuple(tensor.shape)}), and strategy 'pipeline' cuts every tensor along its first dimension: pass "
                "tensors with one row per sample, and keep others as buffers of the model."
            )
    count = next(number for number in range(max(1, min(most, batch)), 0, -1) if batch % number == 0)
    if count == 1:
        return Micro([(args, kwargs)], batch)
    size = batch // count
    _check_plain((list(args), kwargs), batch)

    def part(number: int) -> Any:
        return map_tensors(
            lambda t: t[number * size : (number + 1) * size] if t.dim() and t.shape[0] == batch else t, (args, kwargs)
        )

    return Micro([part(number) for number in range(count)], size)


def signature(data: Any) -> Any:
    """Return a hashable description of arguments: containers, shapes, dtypes, and plain values but floats."""
    if isinstance(data, Tensor):
        return (tuple(data.shape), data.dtype)
    if isinstance(data, dict):
        return tuple((key, signature(value)) for key, value in data.items())
    if isinstance(data, (list, tuple)):
        return (type(data), *map(signature, data))
    if isinstance(data, (str, int, bool, type(None))):
        return data
    inner = tensors_of(data)
    return (type(data), *map(signature, inner))


def plain_leaves(data: Any) -> list[Any]:
    """Return what `data` holds beside tensors, in order."""
    if isinstance(data, Tensor):
        return []
    if isinstance(data, Mapping):
        return [leaf for value in data.values() for leaf in plain_leaves(value)]
    if isinstance(data, (list, tuple)):
        return [leaf for value in data for leaf in plain_leaves(value)]
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return [leaf for field in dataclasses.fields(data) for leaf in plain_leaves(getattr(data, field.name))]
    return [data]


def _check_plain(data: Any, batch: int) -> None:
    """Raise for arguments that may have a part for every sample and cannot be cut.

    Raises:
        UnsupportedError: naming their type.
    """
    for leaf in plain_leaves(data):
        if not isinstance(leaf, PLAIN):
            raise UnsupportedError(
                f"The model is called with a {type(leaf).__name__}, which strategy 'pipeline' cannot cut into "
                "micro-batches: pass tensors, or containers of tensors, or use micro_batches=1."
            )
    for values in _sequences(data):
        if len(values) == batch and not tensors_of(values):
            raise UnsupportedError(
                f"The model is called with a batch of {batch} samples and a {type(values).__name__} of as many values "
                "that are not tensors, which strategy 'pipeline' does not cut into micro-batches: make it a tensor "
                "with one row per sample, or use micro_batches=1."
            )


def _sequences(data: Any) -> Iterator[Sequence[Any]]:
    values = list(data.values()) if isinstance(data, Mapping) else data if isinstance(data, (list, tuple)) else []
    for value in values:
        if isinstance(value, (list, tuple)):
            yield value
        yield from _sequences(value)


def skeleton(output: Any, size: int, count: int) -> Any:
    """Return `output` of one micro-batch with tensors of the batch's shape on the meta device.

    Raises:
        UnsupportedError: if the outputs of the micro-batches cannot be put together.
    """

    def grown(tensor: Tensor) -> Tensor:
        if not tensor.dim() and tensor.is_floating_point():
            return torch.empty((), dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)
        if count > 1 and (not tensor.dim() or tensor.shape[0] != size):
            raise UnsupportedError(
                f"The model returns a tensor of shape {tuple(tensor.shape)} for a micro-batch of {size} samples, and "
                "strategy 'pipeline' puts outputs together along the first dimension: return the loss alone, or "
                "tensors with one row per sample, or use micro_batches=1."
            )
        shape = (tensor.shape[0] * count, *tensor.shape[1:]) if count > 1 else tensor.shape
        return torch.empty(shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)

    for leaf in plain_leaves(output):
        if not isinstance(leaf, PLAIN):
            raise UnsupportedError(
                f"The model returns a {type(leaf).__name__}, which strategy 'pipeline' cannot send to the other ranks: "
                "return tensors, or containers of tensors."
            )
    return map_tensors(grown, output)


def merged(outputs: Sequence[Any]) -> list[Tensor]:
    """Return the tensors of the outputs of all micro-batches, each put together along the first dimension.

    Single numbers, such as a loss beside outputs, are averaged; `CutCheck` finds out whether that is right.
    """
    columns = zip(*map(tensors_of, outputs), strict=True)
    return [_joined(column) for column in columns]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts)) if parts[0].dim() else torch.stack(list(parts)).mean()


def refilled(structure: Any, tensors: Sequence[Tensor]) -> Any:
    """Return `structure` with `tensors` in place of its tensors, in order."""
    rest = iter(tensors)
    return map_tensors(lambda _: next(rest), structure)
