"""Tensors of subclasses in checkpoints, taken apart by ``__tensor_flatten__``.

A class is never imported by its name in a file: the parts of a tensor are loaded into a live one of the same class.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from plugframe.checkpoint.stored import StoredTensor, fill, materialize
from plugframe.utils.shards import is_shard


def is_wrapper(value: Any) -> TypeGuard[Any]:
    """Return whether `value` is a tensor of a subclass that torch can take apart; a ``DTensor`` is none."""
    return (
        isinstance(value, Tensor)
        and callable(getattr(value, "__tensor_flatten__", None))
        and callable(getattr(type(value), "__tensor_unflatten__", None))
        and not (is_shard(value) or value.is_nested)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class FlattenedTensor:
    """A tensor of a subclass, as its ``__tensor_flatten__`` takes it apart.

    Attributes:
        class_name: module and name of its class, such as ``"torchao.….Int8QuantizedTrainingLinearWeight"``.
        tensors: its inner tensors by attribute.
        context: what else the class needs, as text to compare.
        shape: of the tensor itself.
        dtype: of the tensor itself.
    """

    class_name: str
    tensors: Mapping[str, Tensor | StoredTensor | FlattenedTensor]
    context: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Return the size of the inner tensors in bytes."""
        return sum(inner.nbytes for inner in self.tensors.values())

    def problem(self, live: Any) -> str | None:
        """Return why the tensor cannot be loaded into `live`, None if it can."""
        here = name_of(live) if is_wrapper(live) else f"a {type(live).__name__}"
        if here != self.class_name:
            return f"is {here}, the checkpoint has {self.class_name}: it loads into a tensor of that class only"
        if live.shape != self.shape or live.dtype != self.dtype:
            own, theirs = (f"shape {tuple(each.shape)} of {each.dtype}" for each in (live, self))
            return f"has {own}, the checkpoint has {theirs}"
        names, context = live.__tensor_flatten__()
        if list(names) != list(self.tensors) or context_text(context) != self.context:
            return f"is a {self.class_name} with other settings than the checkpoint's"
        for name, inner in self.tensors.items():
            own = getattr(live, name)
            if isinstance(inner, FlattenedTensor):
                problem = inner.problem(own)
            elif is_wrapper(own) or own.shape != inner.shape or own.dtype != inner.dtype:
                problem = f"is {own.dtype} of shape {tuple(own.shape)}, the checkpoint has {inner.dtype} of " + str(
                    tuple(inner.shape)
                )
            else:
                problem = None
            if problem is not None:
                return f"does not fit: its {name} {problem}"
        return None

    def load_into(self, live: Any) -> None:
        """Write the inner tensors into those of `live`, a tensor without a `problem`."""
        fill(self._pairs(live))

    def _pairs(self, live: Any) -> Iterator[tuple[Tensor, Tensor | StoredTensor]]:
        for name, inner in self.tensors.items():
            own = getattr(live, name)
            if isinstance(inner, FlattenedTensor):
                yield from inner._pairs(own)
            else:
                yield own, inner

    def like(self, live: Any) -> Any:
        """Return a new tensor of the class and on the device of `live`, a tensor without a `problem`."""
        with torch.no_grad():
            inner = {name: self._inner_like(name, getattr(live, name)) for name in self.tensors}
            _, context = live.__tensor_flatten__()
            return type(live).__tensor_unflatten__(inner, context, live.shape, live.stride())

    def _inner_like(self, name: str, own: Any) -> Any:
        inner = self.tensors[name]
        return inner.like(own) if isinstance(inner, FlattenedTensor) else materialize(inner).to(own.device, copy=True)


def name_of(value: Any) -> str:
    """Return the name of a tensor's class in manifests."""
    cls = type(value)
    return f"{cls.__module__}.{cls.__qualname__}"


def context_text(context: Any) -> str:
    """Return the context of a ``__tensor_flatten__`` as text, equal for equal contexts.

    Raises:
        TypeError: naming the type of a value that has no such text.
    """
    return json.dumps(_encode(context, 0), sort_keys=True)


def _encode(value: Any, depth: int) -> Any:
    if depth > 20:
        raise TypeError("a value that contains itself")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.device):
        return "a device"  # another one when loaded on another machine
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, enum.Enum):
        return [type(value).__qualname__, value.name]
    if isinstance(value, (list, tuple)):
        return [_encode(item, depth + 1) for item in value]
    if isinstance(value, Mapping):
        return [[_encode(key, depth + 1), _encode(item, depth + 1)] for key, item in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _encode(getattr(value, field.name), depth + 1) for field in dataclasses.fields(value)}
        return [type(value).__qualname__, fields]
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__") and hasattr(value, "__module__")):
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(type(value).__name__)
