"""The ring as a process group of ``torch.distributed``."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plugframe_ringgather.ring import Ring

BACKEND = "ring"
#: Bytes after which a broadcast is handed on while the rest still comes.
_PIECE = 1 << 20

_COMBINE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "SUM": lambda mine, theirs: mine.add_(theirs),
    "AVG": lambda mine, theirs: mine.add_(theirs),
    "PRODUCT": lambda mine, theirs: mine.mul_(theirs),
    "MIN": lambda mine, theirs: torch.minimum(mine, theirs, out=mine),
    "MAX": lambda mine, theirs: torch.maximum(mine, theirs, out=mine),
}


class Done(dist.Work):
    """Work that was done before it was handed out."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._future.set_result(result)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def get_future(self) -> Any:
        return self._future


class RingGroup(dist.ProcessGroup):
    """Collectives in which every rank talks to its two neighbours only.

    A reduction sends 2 (n - 1) / n of the tensor from each of n ranks, whatever n is, and gives all of them the same
    bits: each part is added up in one place (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters
    of workstations", 2009).
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: Any, *, address: str | None = None) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        address = address or socket.gethostbyname(socket.gethostname())
        self.ring = Ring(store, rank, size, timeout_s=timeout.total_seconds(), address=address)

    def getBackendName(self) -> str:
        return BACKEND

    def size(self) -> int:
        return self.ring.size

    def rank(self) -> int:
        return self.ring.rank

    def shutdown(self) -> None:
        self.ring.close()

    def abort(self) -> None:
        self.ring.close()

    # torch's own stubs overload these for its C++ groups; what it calls on a group in Python is this.
    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Done:  # type: ignore[override]
        name = _reduction(dist.ReduceOp.SUM if opts is None else opts.reduceOp)
        for tensor in tensors:
            flat = tensor.contiguous().view(-1)
            parts = list(flat.tensor_split(self.ring.size))
            self._combine(parts, name)
            self._hand_round(parts)
            if flat.data_ptr() != tensor.data_ptr():
                tensor.copy_(flat.view(tensor.shape))
        return Done(tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Done:
        return self.allreduce(tensors, opts)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Done:  # type: ignore[override]
        source = opts.rootRank
        for tensor in tensors:
            flat = tensor.contiguous().view(-1)
            pieces: list[Tensor | None] = list(torch.split(flat, max(_PIECE // flat.element_size(), 1)))
            has, ends = self.ring.rank == source, (self.ring.rank + 1) % self.ring.size == source
            for comes, goes in zip([*pieces, None], [None, *pieces], strict=True):
                if self.ring.size > 1:
                    self.ring.exchange(None if ends else goes, None if has else comes)
            if flat.data_ptr() != tensor.data_ptr():
                tensor.copy_(flat.view(tensor.shape))
        return Done(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Done:  # type: ignore[override]
        for rows, mine in zip(outputs, inputs, strict=True):
            parts = [torch.empty(mine.numel(), dtype=mine.dtype) for _ in rows]
            parts[self.ring.rank].copy_(mine.reshape(-1))
            self._hand_round(parts)
            for row, part in zip(rows, parts, strict=True):
                row.copy_(part.view(row.shape))
        return Done(outputs)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Done:
        return self.allgather([list(output.view(self.ring.size, -1).unbind())], [input])

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Done:  # type: ignore[override]
        name = _reduction(dist.ReduceOp.SUM if opts is None else opts.reduceOp)
        for output, rows in zip(outputs, inputs, strict=True):
            parts = [row.reshape(-1).clone() for row in rows]
            self._combine(parts, name)
            output.copy_(parts[self.ring.rank].view(output.shape))
        return Done(outputs)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Done:
        return self.reduce_scatter([output], [list(input.view(self.ring.size, -1).unbind())], opts)

    # Their names before torch 2.13.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]

    def barrier(self, opts: Any = None) -> Done:
        return self.allreduce([torch.ones(1)])

    def _combine(self, parts: Sequence[Tensor], name: str) -> None:
        """Reduce in place, so that this rank has the result of the part with its own number."""
        ring = self.ring
        combine = _COMBINE[name]
        for step in range(ring.size - 1):
            goes, comes = parts[(ring.rank - step - 1) % ring.size], parts[(ring.rank - step - 2) % ring.size]
            theirs = torch.empty_like(comes)
            ring.exchange(goes, theirs)
            combine(comes, theirs)
        if name == "AVG":
            parts[ring.rank].div_(ring.size)

    def _hand_round(self, parts: Sequence[Tensor]) -> None:
        """Give every rank every part; this one has that of its own number."""
        ring = self.ring
        for step in range(ring.size - 1):
            ring.exchange(parts[(ring.rank - step) % ring.size], parts[(ring.rank - step - 1) % ring.size])


def _reduction(op: Any) -> str:
    for name in _COMBINE:
        if op == getattr(dist.ReduceOp, name):
            return name
    raise ValueError(f"The backend {BACKEND!r} reduces by {', '.join(_COMBINE)}, not by {op}.")


def register(address: str | None) -> None:
    """Make the backend known to torch, by the name ``ring``; groups made from now on listen at `address`."""

    def make(store: Any, rank: int, size: int, timeout: Any) -> RingGroup:
        return RingGroup(store, rank, size, timeout, address=address)

    dist.Backend.register_backend(BACKEND, make, devices=["cpu"])
