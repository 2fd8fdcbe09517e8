"""Map parameters to the elements that DeepSpeed updates on this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plugframe_builtins.deepspeed.library import library

#: Sums a tensor over all ranks.
Sum = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Fragment:
    """A contiguous range of one parameter's elements, and its position in a flat tensor of this rank.

    Attributes:
        flat: the optimizer's tensor: ranges of many parameters, one after another.
        start: of the range in `flat`.
        offset: of the range in the flattened parameter.
        numel: length of the range; 0 if this rank holds nothing of the parameter.
    """

    flat: Tensor
    start: int
    offset: int
    numel: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the range of a tensor with the layout of `flat` (itself, its gradient, its state)."""
        return flat.detach().view(-1).narrow(0, self.start, self.numel)

    def piece(self, full: Tensor) -> Tensor:
        """Return the range of a full tensor."""
        return full.detach().reshape(-1).narrow(0, self.offset, self.numel)


def linked(parameter: Any, flat: Tensor) -> Fragment:
    """Return the fragment of a parameter that DeepSpeed has flattened and linked."""
    link = parameter._hp_mapping
    if link is None:
        return Fragment(flat, 0, 0, 0)
    place, run = link.hp_fragment_address, link.lp_fragment_address
    return Fragment(flat, place.start, run.start, place.numel)


class Fragments:
    """The fragments of one engine's parameters.

    Args:
        add_up: sums over all ranks.
    """

    def __init__(self, add_up: Sum) -> None:
        self._add_up = add_up
        self._by_id: dict[int, tuple[Tensor, Fragment]] = {}

    def add(self, parameter: Tensor, fragment: Fragment) -> None:
        """Add a parameter. Every rank must add the same ones."""
        self._by_id[id(parameter)] = parameter, fragment

    def get(self, parameter: Tensor) -> Fragment | None:
        """Return the fragment of a parameter, None if it is not trained."""
        found = self._by_id.get(id(parameter))
        return None if found is None else found[1]

    def parameters(self) -> list[Tensor]:
        """Return the trained parameters."""
        return [parameter for parameter, _ in self._by_id.values()]

    @torch.no_grad()
    def full(self, parameter: Tensor, flat: Tensor | None = None) -> Tensor:
        """Return the full parameter, gathered from all ranks. Every rank must call it.

        Args:
            flat: a tensor with the layout of the fragment's `flat` to gather instead of the weights.
        """
        fragment = self._by_id[id(parameter)][1]
        source = fragment.flat if flat is None else flat
        numel, shape = extent(parameter)
        full = torch.zeros(numel, dtype=source.dtype, device=parameter.device)
        fragment.piece(full).copy_(fragment.of(source))
        return self._add_up(full).view(shape)

    @torch.no_grad()
    def put(self, parameter: Tensor, value: Tensor, flat: Tensor | None = None, *, full: bool = True) -> None:
        """Write this rank's elements, from a full tensor or from the range alone."""
        fragment = self._by_id[id(parameter)][1]
        fragment.of(fragment.flat if flat is None else flat).copy_(fragment.piece(value) if full else value)


def extent(parameter: Any) -> tuple[int, torch.Size]:
    """Return the number of elements and the shape of a parameter, which may be sharded."""
    if hasattr(parameter, "ds_shape"):
        return int(parameter.ds_numel), torch.Size(parameter.ds_shape)
    return parameter.numel(), parameter.shape


@contextmanager
def gathered(parameter: Any, *, write: bool = False) -> Iterator[Tensor]:
    """Gather a parameter, which may be sharded, for a block. Every rank must call it."""
    if not hasattr(parameter, "ds_id"):
        yield parameter.data
        return
    parameter.ds_active_sub_modules.clear()  # an aborted forward leaves it in use
    with library("runtime.zero").GatheredParameters([parameter], modifier_rank=0 if write else None):
        yield parameter.data
