"""A process group with one real rank: all others are assumed to hold the same tensors."""

# torch's stubs describe C++ groups; torch calls other names on a Python group.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plugframe_builtins.simulate.traffic import Traffic

BACKEND = "simulate"


class Done(dist.Work):
    """Work that is complete from the start."""

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


class SimulatedGroup(dist.ProcessGroup):
    """Collectives that send nothing: every other rank is assumed to hold the tensors of this one.

    So a sum is `size` times the tensor and a mean is the tensor; shapes, dtypes, the order of calls and memory
    are those of real collectives. The bytes that would be sent are counted in `traffic`.

    torch's own fake process group is in ``torch.testing._internal``; it leaves results of reductions unwritten, at
    which DistributedDataParallel fails.
    """

    def __init__(self, name: str, rank: int, size: int, traffic: Traffic) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._name, self._rank, self._size, self._traffic = name, rank, size, traffic

    @property
    def group_name(self) -> Any:
        """The group's name in torch, which keeps it for C++ groups only."""
        return self._name

    def getBackendName(self) -> str:
        return BACKEND

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def shutdown(self) -> None:
        """Do nothing: there are no peers."""

    def abort(self) -> None:
        """Do nothing: there is no pending work."""

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Done:  # type: ignore[override]
        self._count("all_reduce", tensors)
        for tensor in tensors:
            _reduce(tensor, opts, self._size)
        return Done(tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Done:
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> Done:  # type: ignore[override]
        self._count("reduce", tensors)
        for tensor in tensors if opts.rootRank == self._rank else ():
            _reduce(tensor, opts, self._size)
        return Done(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Done:  # type: ignore[override]
        self._count("broadcast", tensors)
        return Done(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Done:  # type: ignore[override]
        self._count("all_gather", inputs)
        for rows, mine in zip(outputs, inputs, strict=True):
            for row in rows:
                row.copy_(mine.view(row.shape))
        return Done(outputs)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Done:
        self._count("all_gather", [input])
        output.view(self._size, -1).copy_(input.reshape(1, -1).expand(self._size, -1))
        return Done([output])

    def allgather_into_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Done:
        for output, mine in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, mine)
        return Done(outputs)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Done:  # type: ignore[override]
        for output, rows in zip(outputs, inputs, strict=True):
            self._count("reduce_scatter", rows)
            output.copy_(rows[self._rank].view(output.shape))
            _reduce(output, opts, self._size)
        return Done(outputs)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Done:
        return self.reduce_scatter([output], [list(input.view(self._size, -1).unbind())], opts)

    def reduce_scatter_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Done:
        for output, rows in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, rows, opts)
        return Done(outputs)

    # Their names before torch 2.13.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Done:  # type: ignore[override]
        self._count("gather", inputs)
        for rows, mine in zip(outputs, inputs, strict=False):
            for row in rows:
                row.copy_(mine.view(row.shape))
        return Done(outputs)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Done:  # type: ignore[override]
        self._count("scatter", inputs[0] if inputs else ())
        for output in () if inputs else outputs:
            output.zero_()  # another rank's row is not known
        for output, rows in zip(outputs, inputs, strict=False):
            output.copy_(rows[self._rank].view(output.shape))
        return Done(outputs)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Done:
        self._count("all_to_all", inputs)
        for output in outputs:
            _fill(output, inputs[self._rank])
        return Done(outputs)

    def alltoall_base(
        self, output: Tensor, input: Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any = None
    ) -> Done:
        self._count("all_to_all", [input])
        parts = torch.split(output, output_sizes or len(output) // self._size)
        mine = torch.split(input, input_sizes or len(input) // self._size)[self._rank]
        for part in parts:
            _fill(part, mine)
        return Done([output])

    def barrier(self, opts: Any = None) -> Done:
        self._count("barrier", [])
        return Done([])

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> Done:
        self._count("send", tensors)
        return Done(tensors)

    def recv(self, tensors: list[Tensor], src: int, tag: int) -> Done:
        """Write zeros: what another rank would send is not known."""
        for tensor in tensors:
            tensor.zero_()
        return Done(tensors)

    def _count(self, call: str, tensors: Sequence[Tensor]) -> None:
        self._traffic.add(call, sum(tensor.nbytes for tensor in tensors))


def _reduce(tensor: Tensor, opts: Any, size: int) -> None:
    """Reduce `size` tensors equal to this one, in place."""
    op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
    if op == dist.ReduceOp.SUM:
        tensor.mul_(size)
    elif op == dist.ReduceOp.PRODUCT:
        tensor.pow_(size)
    elif op == dist.ReduceOp.BXOR and size % 2 == 0:
        tensor.zero_()


def _fill(output: Tensor, mine: Tensor) -> None:
    """Copy `mine`, and fill the rest with zeros."""
    flat, given = output.view(-1), mine.reshape(-1)[: output.numel()]
    flat[: given.numel()] = given
    flat[given.numel() :] = 0


def register(traffic: Traffic) -> None:
    """Register the backend with torch for every device; groups created from now on count in `traffic`."""

    def make(options: Any, _: Any) -> SimulatedGroup:
        return SimulatedGroup(options.group_id, options.group_rank, options.group_size, traffic)

    accelerator = torch.accelerator.current_accelerator()
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    dist.Backend.register_backend(BACKEND, make, extended_api=True, devices=devices)
