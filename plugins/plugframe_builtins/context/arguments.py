"""Which arguments of a block are divided along the sequence."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from plugframe.base import map_tensors
from plugframe.errors import SettingError, UnsupportedError

#: Words in the names of arguments that are used whole: attention takes masks of all tokens.
_WHOLE = ("mask", "bias")


class Arguments:
    """The arguments of one class of blocks: which are hidden states, and which are split.

    Args:
        forward: the block's forward, without the block.
        dim: the sequence dimension of the hidden states.
        rules: ``"split"`` or ``"whole"`` by name.
        block: the path of the block, for messages.
    """

    def __init__(self, forward: Callable[..., Any], dim: int, rules: Mapping[str, str], block: str) -> None:
        self._names = list(inspect.signature(forward).parameters)
        self._dim = dim
        self._rules = rules
        self._block = block
        self._known: dict[tuple[str, int], int | None] = {}

    def hidden(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """Return position or name of the hidden states, and themselves.

        Raises:
            UnsupportedError: if they are no dense floating-point tensor with the sequence dimension.
        """
        key: Any = 0
        if not args:
            key = next((name for name in kwargs if name in self._names[:1]), next(iter(kwargs), ""))
        found = args[0] if args else kwargs.get(key)
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.is_nested or found.ndim <= self._dim:
            nested = isinstance(found, Tensor) and found.is_nested
            what = "a nested tensor" if nested else type(found).__name__
            what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) and not nested else what
            advice = " Build nn.TransformerEncoder with enable_nested_tensor=False." if nested else ""
            raise UnsupportedError(
                f"Block {self._block!r} got {what} as its first argument, and strategy 'context' divides hidden states "
                f"along dim={self._dim} there: pass them first, or set dim= or blocks= of ContextParallel.{advice}"
            )
        return key, found

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, str, Any]]:
        """Yield position or key, name and value of each argument."""
        for number, value in enumerate(args):
            yield number, self._names[number] if number < len(self._names) else f"argument {number}", value
        for name, value in kwargs.items():
            yield name, name, value

    def apply(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], fn: Callable[[Any, str, Tensor], Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with ``fn(key, name, tensor)`` in place of each tensor."""
        new = {
            key: map_tensors(lambda tensor, key=key, name=name: fn(key, name, tensor), value)  # type: ignore[misc]
            for key, name, value in self.named(args, kwargs)
        }
        return tuple(new[number] for number in range(len(args))), {name: new[name] for name in kwargs}

    def dim_of(self, name: str, tensor: Tensor, hidden: Tensor, length: int) -> int | None:
        """Return the dimension of an argument that is the sequence, None if it is used whole.

        Args:
            hidden: hidden states, of this rank or complete.
            length: the length of the complete sequence.

        Raises:
            SettingError: if an argument that is to be split has no such dimension, or several.
        """
        rule = self._rules.get(name)
        dims = [dim for dim, size in enumerate(tensor.shape) if size == length]
        if rule == "whole" or (rule is None and (not dims or self._is_mask(name, tensor, length))):
            found = None
        elif len(dims) == 1 and (rule == "split" or length not in hidden.shape[: self._dim]):
            found = dims[0]
        else:
            found = self._ambiguous(name, tensor, hidden, dims)
        self._known.setdefault((name, tensor.ndim), found)
        return found

    def _ambiguous(self, name: str, tensor: Tensor, hidden: Tensor, dims: list[int]) -> int | None:
        """Return the sequence dimension of an argument where others, those of the batch say, have as many elements."""
        known = self._known.get((name, tensor.ndim), -1)
        if known is None or known in dims:
            return known
        batch = tensor.ndim > self._dim > 0 and tensor.shape[: self._dim] == hidden.shape[: self._dim]
        inner = [dim for dim in dims if dim >= self._dim] if batch else dims
        if batch and (len(inner) == 1 or self._dim in inner):
            return min(inner)
        if not batch and len(inner) == 1:
            return inner[0]
        raise SettingError(
            f"strategy 'context' cannot tell which dimension of {name!r} of block {self._block!r}, of shape "
            f"{tuple(tensor.shape)}, has the tokens: pass ContextParallel(arguments={{{name!r}: 'split'}}), or 'whole'."
        )

    @staticmethod
    def _is_mask(name: str, tensor: Tensor, length: int) -> bool:
        if any(word in name.lower() for word in _WHOLE) or not (tensor.is_floating_point() or _is_integer(tensor)):
            return True
        pairs = tensor.ndim >= 3 and tensor.shape[-1] == length and tensor.shape[-2] in (1, length)
        return tensor.is_floating_point() and pairs


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype.is_signed
