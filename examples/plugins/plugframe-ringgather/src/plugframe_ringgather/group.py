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
#: Size of the chunks in which a broadcast is forwarded.
_CHUNK_BYTES = 1 << 20

_COMBINE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "SUM": lambda local, received: local.add_(received),
    "AVG": lambda local, received: local.add_(received),
    "PRODUCT": lambda local, received: local.mul_(received),
    "MIN": lambda local, received: torch.minimum(local, received, out=local),
    "MAX": lambda local, received: torch.maximum(local, received, out=local),
}


class Done(dist.Work):
    """Work that is already complete."""

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
    """A process group in which every rank communicates with its two neighbours only.

    In a reduction each of n ranks sends 2 (n - 1) / n of the tensor, for any n. The result is bit-identical on all
    ranks, since each shard is summed in a single order (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms
    for clusters of workstations", 2009).
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: Any, *, address: str | None = None) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        address = address or socket.gethostbyname(socket.gethostname())
        self.ring = Ring(store, rank, size, timeout_s=timeout.total_seconds(), address=address)

    def getBackendName(self) -> str:
        return BACKEND

    @property
    def group_name(self) -> str:  # type: ignore[override]
        """The name under which torch registers the group: a device mesh refers to its groups by name."""
        names: dict[Any, str] = dist.distributed_c10d._world.pg_names
        return names[self]

    def size(self) -> int:
        return self.ring.size

    def rank(self) -> int:
        return self.ring.rank

    def shutdown(self) -> None:
        self.ring.close()

    def abort(self) -> None:
        self.ring.close()

    # torch's stubs overload these for its C++ groups; on a Python group it calls these signatures.
    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Done:  # type: ignore[override]
        name = _reduction(dist.ReduceOp.SUM if opts is None else opts.reduceOp)
        for tensor in tensors:
            flat = tensor.contiguous().view(-1)
            shards = list(flat.tensor_split(self.ring.size))
            self._combine(shards, name)
            self._all_gather(shards)
            if flat.data_ptr() != tensor.data_ptr():
                tensor.copy_(flat.view(tensor.shape))
        return Done(tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Done:
        return self.allreduce(tensors, opts)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Done:  # type: ignore[override]
        source = opts.rootRank
        for tensor in tensors:
            flat = tensor.contiguous().view(-1)
            chunks: list[Tensor | None] = list(torch.split(flat, max(_CHUNK_BYTES // flat.element_size(), 1)))
            is_source, is_last = self.ring.rank == source, (self.ring.rank + 1) % self.ring.size == source
            for incoming, outgoing in zip([*chunks, None], [None, *chunks], strict=True):
                if self.ring.size > 1:
                    self.ring.exchange(None if is_last else outgoing, None if is_source else incoming)
            if flat.data_ptr() != tensor.data_ptr():
                tensor.copy_(flat.view(tensor.shape))
        return Done(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Done:  # type: ignore[override]
        for rows, local in zip(outputs, inputs, strict=True):
            shards = [torch.empty(local.numel(), dtype=local.dtype) for _ in rows]
            shards[self.ring.rank].copy_(local.reshape(-1))
            self._all_gather(shards)
            for row, shard in zip(rows, shards, strict=True):
                row.copy_(shard.view(row.shape))
        return Done(outputs)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Done:
        return self.allgather([list(output.view(self.ring.size, -1).unbind())], [input])

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Done:  # type: ignore[override]
        name = _reduction(dist.ReduceOp.SUM if opts is None else opts.reduceOp)
        for output, rows in zip(outputs, inputs, strict=True):
            shards = [row.reshape(-1).clone() for row in rows]
            self._combine(shards, name)
            output.copy_(shards[self.ring.rank].view(output.shape))
        return Done(outputs)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Done:
        return self.reduce_scatter([output], [list(input.view(self.ring.size, -1).unbind())], opts)

    # Their names before torch 2.13.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]

    # What DTensor calls.
    def allgather_into_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Done:
        for output, local in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, local)
        return Done(outputs)

    def reduce_scatter_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Done:
        for output, local in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, local, opts)
        return Done(outputs)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Done:  # type: ignore[override]
        rows = inputs[0] if opts.rootRank == self.ring.rank else [torch.empty_like(outputs[0])] * self.ring.size
        everything = torch.stack(rows)
        self.broadcast([everything], opts)
        outputs[0].copy_(everything[self.ring.rank])
        return Done(outputs)

    def barrier(self, opts: Any = None) -> Done:
        return self.allreduce([torch.ones(1)])

    def _combine(self, shards: Sequence[Tensor], name: str) -> None:
        """Reduce in place; this rank gets the result of the shard with its rank as index."""
        ring = self.ring
        combine = _COMBINE[name]
        for step in range(ring.size - 1):
            outgoing, incoming = shards[(ring.rank - step - 1) % ring.size], shards[(ring.rank - step - 2) % ring.size]
            received = torch.empty_like(incoming)
            ring.exchange(outgoing, received)
            combine(incoming, received)
        if name == "AVG":
            shards[ring.rank].div_(ring.size)

    def _all_gather(self, shards: Sequence[Tensor]) -> None:
        """Send every shard to every rank; this one holds the shard with its rank as index."""
        ring = self.ring
        for step in range(ring.size - 1):
            ring.exchange(shards[(ring.rank - step) % ring.size], shards[(ring.rank - step - 1) % ring.size])


def _reduction(op: Any) -> str:
    for name in _COMBINE:
        if op == getattr(dist.ReduceOp, name):
            return name
    raise ValueError(f"The backend {BACKEND!r} supports the reductions {', '.join(_COMBINE)}, not {op}.")


def register(address: str | None) -> None:
    """Register the backend with torch as ``ring``; new groups listen at `address`."""

    def make(store: Any, rank: int, size: int, timeout: Any) -> RingGroup:
        return RingGroup(store, rank, size, timeout, address=address)

    dist.Backend.register_backend(BACKEND, make, devices=["cpu"])
