"""Parameters of experts: sharded over all ranks, and sent to the ranks whose experts they are while these run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from plugframe_builtins._shared.torch_collective.gradients import linear
from plugframe_builtins.expert.axis import ExpertAxis


@dataclass(frozen=True, eq=False)
class Entry:
    """A parameter.

    Attributes:
        module: that has it.
        name: in the module.
        expert: whose it is, None for one that stacks the parameters of all.
        owner: the index along the axis of the ranks that run the expert, None if each runs its own part.
    """

    module: nn.Module
    name: str
    expert: int | None
    owner: int | None

    @property
    def sharded(self) -> DTensor:
        """The parameter as it is outside of forwards."""
        parameter = self.module._parameters[self.name]
        assert isinstance(parameter, DTensor)
        return parameter

    @property
    def dim(self) -> int:
        """The dimension along which the shards that a rank receives are joined."""
        return 1 if self.owner is None else 0


class Weights:
    """The parameters of the experts of one list or module.

    Gradients are summed over the tokens of all ranks, and divided by the number of ranks: each rank's loss is the mean
    over its own samples.

    Args:
        axis: over which the experts are divided.
        entries: the parameters, whose modules get shards instead.
    """

    def __init__(self, axis: ExpertAxis, entries: Sequence[Entry]) -> None:
        self.axis = axis
        self.entries = list(entries)
        for entry in entries:
            held = entry.module._parameters[entry.name]
            assert held is not None
            placements = [Shard(entry.dim)] * axis.mesh.ndim
            placements[axis.dim] = Shard(0)
            made = nn.Parameter(axis.shard(held, placements), requires_grad=held.requires_grad)
            entry.module._parameters[entry.name] = made
        ranks = range(axis.num_ranks)
        self._shapes = {entry: [axis.shape_on(rank, entry.sharded) for rank in ranks] for entry in entries}
        self._sizes = {entry: [math.prod(shape) for shape in shapes] for entry, shapes in self._shapes.items()}

    @property
    def trains(self) -> bool:
        """Whether any parameter requires a gradient; equal on all ranks."""
        return any(entry.sharded.requires_grad for entry in self.entries)

    def gather(self, experts: Sequence[int]) -> tuple[dict[Entry, Tensor], list[Tensor]]:
        """Return the parameters that this rank needs to run its part of `experts`, and tensors that tie ranks.

        Every rank must call it with the same experts, and run the backward of the latter.
        """
        wanted = [entry for entry in self.entries if entry.expert is None or entry.expert in experts]
        found: dict[Entry, Tensor] = {}
        ties: list[Tensor] = []
        for dtype in dict.fromkeys(entry.sharded.dtype for entry in wanted):
            alike = [entry for entry in wanted if entry.sharded.dtype is dtype]
            received = self._send(alike, dtype)
            ties.append(received)
            found |= self._joined(alike, received)
        return found, ties

    def _send(self, entries: Sequence[Entry], dtype: torch.dtype) -> Tensor:
        axis = self.axis
        me, ranks = axis.rank, range(axis.num_ranks)
        sizes = [self._sizes[entry][me] for entry in entries]
        mine = torch.cat([entry.sharded.to_local().reshape(-1) for entry in entries])
        # For each rank in turn, the numbers of the shards that it gets.
        taken = [i for dst in ranks for i, entry in enumerate(entries) if self._goes(entry, me, dst)]
        sent = [sum(sizes[i] for i, entry in enumerate(entries) if self._goes(entry, me, dst)) for dst in ranks]
        received = [sum(self._sizes[entry][src] for entry in entries if self._goes(entry, src, me)) for src in ranks]
        cast = axis.dtype if axis.dtype is not None and dtype.is_floating_point else dtype
        # Each rank has all of its own part of stacked parameters.
        local = axis.num_ranks == axis.size and all(entry.owner is None for entry in entries)

        def send(shards: Tensor) -> Tensor:
            if local:
                return shards.to(cast, copy=True)
            parts = torch.split(shards.to(cast), sizes)
            rows = torch.cat([parts[i] for i in taken] or [shards.new_zeros(0, dtype=cast)])
            return axis.all_to_all(rows, received, sent, axis.group)

        def back(gradient: Tensor) -> Tensor:
            if local:
                return gradient.to(dtype) / axis.num_ranks
            rows = axis.all_to_all(gradient.to(dtype), sent, received, axis.group)
            total = [gradient.new_zeros(size, dtype=dtype) for size in sizes]
            for i, part in zip(taken, torch.split(rows, [sizes[i] for i in taken]), strict=True):
                total[i] += part
            return torch.cat(total) / axis.num_ranks

        return linear(mine, send, back) if mine.requires_grad else send(mine)

    def _goes(self, entry: Entry, src: int, dst: int) -> bool:
        """Return whether a rank sends its shard to another one."""
        owner = self.axis.index_of(src) if entry.owner is None else entry.owner
        return self.axis.index_of(dst) == owner

    def _joined(self, entries: Sequence[Entry], received: Tensor) -> dict[Entry, Tensor]:
        me, ranks = self.axis.rank, range(self.axis.num_ranks)
        order = [(src, entry) for src in ranks for entry in entries if self._goes(entry, src, me)]
        parts: dict[Entry, list[Tensor]] = {}
        rows = torch.split(received, [self._sizes[entry][src] for src, entry in order])
        for (src, entry), row in zip(order, rows, strict=True):
            parts.setdefault(entry, []).append(row.view(self._shapes[entry][src]))
        return {entry: torch.cat(each, entry.dim) for entry, each in parts.items()}

    def empty(self) -> dict[Entry, Tensor]:
        """Return zeros in place of the parameters that this rank runs, to find out shapes."""
        found: dict[Entry, Tensor] = {}
        for entry in self.entries:
            shape = list(entry.sharded.shape)
            if entry.owner is None:
                shape[0] = self._shapes[entry][self.axis.rank][0]
            elif entry.owner != self.axis.index:
                continue
            dtype = self.axis.dtype or entry.sharded.dtype
            found[entry] = torch.zeros(shape, dtype=dtype, device=self.axis.device)
        return found


@contextmanager
def installed(values: dict[Entry, Tensor]) -> Iterator[None]:
    """Let modules use these tensors as their parameters."""
    before = {entry: entry.module._parameters[entry.name] for entry in values}
    for entry, value in values.items():
        entry.module._parameters[entry.name] = value  # type: ignore[assignment]
    try:
        yield
    finally:
        for entry, parameter in before.items():
            entry.module._parameters[entry.name] = parameter
