"""Cut a batch into micro-batches along the first dimension, and put results together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plugframe.base import map_tensors
from plugframe.errors import UnsupportedError
from plugframe_builtins.pipeline.stand_in import tensors_of


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

    def part(number: int) -> Any:
        return map_tensors(
            lambda t: t[number * size : (number + 1) * size] if t.dim() and t.shape[0] == batch else t, (args, kwargs)
        )

    return Micro([part(number) for number in range(count)], size)


def signature(data: Any) -> Any:
    """Return a hashable description of arguments: containers, shapes, dtypes, and plain values."""
    if isinstance(data, Tensor):
        return (tuple(data.shape), data.dtype)
    if isinstance(data, dict):
        return tuple((key, signature(value)) for key, value in data.items())
    if isinstance(data, (list, tuple)):
        return (type(data), *map(signature, data))
    if isinstance(data, (str, int, float, bool, type(None))):
        return data
    inner = tensors_of(data)
    return (type(data), *map(signature, inner))


def skeleton(output: Any, size: int, count: int) -> Any:
    """Return `output` of one micro-batch with tensors of the batch's shape on the meta device.

    Raises:
        UnsupportedError: if a tensor has no row per sample, so that the micro-batches cannot be put together.
    """

    def grown(tensor: Tensor) -> Tensor:
        if count > 1 and (not tensor.dim() or tensor.shape[0] != size):
            raise UnsupportedError(
                f"The model returns a tensor of shape {tuple(tensor.shape)} for a micro-batch of {size} samples, and "
                "strategy 'pipeline' puts outputs together along the first dimension: return the loss alone, or "
                "tensors with one row per sample, or use micro_batches=1."
            )
        shape = (tensor.shape[0] * count, *tensor.shape[1:]) if count > 1 else tensor.shape
        return torch.empty(shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)

    return map_tensors(grown, output)


def merged(outputs: Sequence[Any]) -> list[Tensor]:
    """Return the tensors of the outputs of all micro-batches, each put together along the first dimension."""
    columns = zip(*map(tensors_of, outputs), strict=True)
    return [column[0] if len(column) == 1 else torch.cat(column) for column in columns]


def refilled(structure: Any, tensors: Sequence[Tensor]) -> Any:
    """Return `structure` with `tensors` in place of its tensors, in order."""
    rest = iter(tensors)
    return map_tensors(lambda _: next(rest), structure)
