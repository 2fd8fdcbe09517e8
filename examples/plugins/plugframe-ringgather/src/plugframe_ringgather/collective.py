"""The collective on the ring process group."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Import before a group exists: its functions bind the default group at import time.
import torch.distributed.nn.functional
from torch import Tensor

from plugframe.base import Collective, check_reduction
from plugframe.errors import CollectiveMismatchError, EnvironmentMismatchError, OrderError, SettingError
from plugframe.hooks import ReduceOp, hookimpl
from plugframe.hooks.context import Context
from plugframe_ringgather.group import BACKEND, register

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.AVG,
    "avg": dist.ReduceOp.AVG,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "product": dist.ReduceOp.PRODUCT,
}
# For bools, sum is or, and product is and.
_BOOL_OPS = {**_OPS, "sum": dist.ReduceOp.MAX, "product": dist.ReduceOp.MIN}
#: Bytes of the message that describes a call.
_MESSAGE_BYTES = 160


class RingCollective(Collective):
    """Communicate through a process group whose ranks form a ring.

    An existing process group is used unchanged, and is not destroyed at tear-down.

    Args:
        timeout_s: timeout of a collective in seconds; by default ``--timeout``, else 1800.
        interface: address at which a rank listens for its neighbour; by default loopback for a job on one node, and
            the address of the host name otherwise.
    """

    def __init__(self, *, timeout_s: float | None = None, interface: str | None = None) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise SettingError(f"timeout_s={timeout_s!r} must be a number of seconds above 0.")
        self.timeout_s, self.interface = timeout_s, interface
        self._undo = ExitStack()
        self._store: Any = None
        self._barriers = 0

    @hookimpl
    def collective_setup(self, context: Context) -> None:
        super().collective_setup(context)
        world = context.world
        timeout_s = self.timeout_s or context.timeout_s or 1800.0
        store = context.hooks.environment_store(context=context, timeout_s=timeout_s)
        turn = store.add(f"{BACKEND}/turns/{world.global_rank}", 1)
        self._store = dist.PrefixStore(f"{BACKEND}/{turn}", store)  # type: ignore[attr-defined]
        self._undo.callback(setattr, self, "_store", None)
        if dist.is_initialized():
            found = dist.get_rank(), dist.get_world_size()
            if found != (world.global_rank, world.world_size):
                raise EnvironmentMismatchError(
                    f"torch.distributed is initialized as rank {found[0]} of {found[1]}, but this process is rank "
                    f"{world.global_rank} of {world.world_size}: leave init_process_group() to plugframe."
                )
            return
        register(self.interface or ("127.0.0.1" if world.num_nodes == 1 else None))
        self._undo.callback(_keep_excepthook())
        dist.init_process_group(
            BACKEND,
            store=self._store,
            rank=world.global_rank,
            world_size=world.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        self._undo.callback(_destroy)

    @hookimpl
    def collective_teardown(self) -> None:
        self._undo.close()

    @hookimpl
    def collective_all_gather(self, tensor: Tensor, group: Any, sync_grads: bool) -> Tensor:
        peers = self._peers(group)
        self._check_same_call("all_gather", tensor, peers)
        if sync_grads:
            gathered: Tensor = _Gather.apply(tensor, self, peers)  # type: ignore[no-untyped-call]
            return gathered
        return self._gather(tensor, peers)

    def _gather(self, tensor: Tensor, peers: dist.ProcessGroup) -> Tensor:
        local = tensor.detach().resolve_conj().resolve_neg().contiguous()
        gathered_rows = local.new_empty(peers.size(), *local.shape)
        if local.numel():
            rows = list(gathered_rows.view(peers.size(), -1).view(torch.uint8).unbind())
            dist.all_gather(rows, local.view(-1).view(torch.uint8), group=peers)
        return gathered_rows

    @hookimpl
    def collective_all_reduce(self, tensor: Tensor, op: ReduceOp, group: Any) -> Tensor:
        check_reduction(op, tensor)
        peers = self._peers(group)
        self._check_same_call(f"all_reduce({op})", tensor, peers)
        flat = _flat_copy(tensor, op)
        if flat.numel():
            dist.all_reduce(flat, (_BOOL_OPS if tensor.dtype is torch.bool else _OPS)[op], group=peers)
        return _restored(flat, tensor).view(tensor.shape)

    @hookimpl
    def collective_reduce_scatter(self, tensor: Tensor, op: ReduceOp, group: Any) -> Tensor:
        peers = self._peers(group)
        if tensor.shape[:1] != (peers.size(),):
            size, shape = peers.size(), tuple(tensor.shape)
            raise SettingError(f"reduce_scatter over {size} ranks takes shape ({size}, …), got {shape}.")
        check_reduction(op, tensor)
        self._check_same_call(f"reduce_scatter({op})", tensor, peers)
        rows = _flat_copy(tensor, op).view(peers.size(), -1)
        local = torch.empty_like(rows[0])
        if local.numel():
            kind = (_BOOL_OPS if tensor.dtype is torch.bool else _OPS)[op]
            dist.reduce_scatter(local, list(rows.unbind()), kind, group=peers)
        return _restored(local, tensor).view(tensor.shape[1:])

    @hookimpl
    def collective_broadcast(self, tensor: Tensor, src: int, group: Any) -> Tensor:
        peers = self._peers(group, src)
        self._check_same_call(f"broadcast(src={src})", tensor, peers)
        result = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        if result.numel():
            dist.broadcast(result.view(-1).view(torch.uint8), src, group=peers)
        return result

    @hookimpl
    def collective_all_gather_object(self, obj: Any, group: Any) -> list[Any]:
        # Not dist.all_gather_object, which fails where NumPy is not installed.
        peers = self._peers(group)
        data = _pickled(obj)
        sizes = self._gather(torch.tensor(data.numel()), peers).tolist()
        rows = self._gather(torch.nn.functional.pad(data, (0, max(sizes) - data.numel())), peers)
        return [_unpickled(row[:size]) for row, size in zip(rows, sizes, strict=True)]

    @hookimpl
    def collective_broadcast_object(self, obj: Any, src: int, group: Any) -> Any:
        peers = self._peers(group, src)
        here = dist.get_rank() == src
        data = _pickled(obj) if here else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor(data.numel())
        dist.broadcast(size, src, group=peers)
        data = data if here else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, src, group=peers)
        return obj if here else _unpickled(data)

    @hookimpl
    def collective_barrier(self, name: str, group: Any) -> None:
        try:
            dist.barrier(group=self._peers(group))
        except RuntimeError as error:
            raise RuntimeError(f"The barrier {name!r} failed on rank {dist.get_rank()}: {error}") from error

    @hookimpl
    def collective_monitored_barrier(self, name: str, timeout_s: float) -> None:
        self._peers(None)
        self._barriers += 1
        key, world = f"barrier/{self._barriers}", self.context.world
        self._store.set(f"{key}/{world.global_rank}", name)
        missing, deadline = list(range(world.world_size)), time.monotonic() + timeout_s
        while missing := [rank for rank in missing if not self._store.check([f"{key}/{rank}"])]:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"The barrier {name!r} waited {timeout_s:g} s on rank {world.global_rank}: missing "
                    f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing))}."
                )
            time.sleep(0.005)

    @hookimpl
    def collective_new_group(self, ranks: Sequence[int]) -> Any:
        return dist.new_group(list(ranks))

    @hookimpl
    def collective_process_group(self) -> Any:
        return dist.group.WORLD if self._store is not None else None

    def _peers(self, group: Any, src: int | None = None) -> dist.ProcessGroup:
        peers = dist.group.WORLD if group is None else group
        if peers is None or self._store is None:
            raise OrderError("The ring is not set up: call lite.launch() first.")
        if dist.get_rank(peers) < 0:
            raise SettingError(f"Rank {dist.get_rank()} is not in this group: call this on its members only.")
        if src is not None and src not in dist.get_process_group_ranks(peers):
            members = ", ".join(map(str, dist.get_process_group_ranks(peers)))
            raise SettingError(f"src={src} is not in this group, which has the ranks {members} of the job.")
        return peers

    def _check_same_call(self, call: str, tensor: Tensor, peers: dist.ProcessGroup) -> None:
        """Raise on all ranks if calls differ: a neighbour would otherwise misread the data.

        Raises:
            CollectiveMismatchError: with the call of each rank.
        """
        text = f"{call} of {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        message = torch.frombuffer(bytearray(text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES)), dtype=torch.uint8)
        rows = [torch.empty_like(message) for _ in range(peers.size())]
        dist.all_gather(rows, message, group=peers)
        if all(torch.equal(row, message) for row in rows):
            return
        ranks = dist.get_process_group_ranks(peers)
        calls = "; ".join(f"rank {n}: {bytes(r.tolist()).decode().strip()}" for n, r in zip(ranks, rows, strict=True))
        raise CollectiveMismatchError(f"The ranks make different collective calls: {calls}.")


class _Gather(torch.autograd.Function):
    """All-gather; its backward sums the gradients of a row over ranks, by reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, collective: RingCollective, peers: Any) -> Tensor:
        ctx.rest = collective, peers
        return collective._gather(tensor, peers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, None, None]:
        return _Scatter.apply(grads[0], *ctx.rest), None, None  # type: ignore[no-untyped-call]


class _Scatter(torch.autograd.Function):
    """Reduce-scatter; its backward is an all-gather, for higher-order gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, collective: RingCollective, peers: Any) -> Tensor:
        ctx.rest = collective, peers
        return collective.collective_reduce_scatter(tensor=rows, op="sum", group=peers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, None, None]:
        return _Gather.apply(grads[0], *ctx.rest), None, None  # type: ignore[no-untyped-call]


def _flat_copy(tensor: Tensor, op: str) -> Tensor:
    """Return a flat copy in a dtype that can accumulate."""
    dtype = tensor.dtype
    if dtype is torch.bool:
        dtype = torch.uint8
    elif tensor.is_floating_point() and tensor.element_size() < (4 if op in ("mean", "avg") else 2):
        dtype = torch.float32  # a sum in half precision can overflow although the mean does not
    work = tensor.detach().resolve_conj().resolve_neg().to(dtype, copy=True, memory_format=torch.contiguous_format)
    return (torch.view_as_real(work) if work.is_complex() else work).reshape(-1)


def _restored(flat: Tensor, like: Tensor) -> Tensor:
    return (torch.view_as_complex(flat.view(-1, 2)) if like.is_complex() else flat).to(like.dtype)


def _pickled(obj: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)


def _unpickled(data: Tensor) -> Any:
    return pickle.loads(bytes(data.tolist()))


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _keep_excepthook() -> Any:
    """Return a function that restores ``sys.excepthook``, which torch replaces with every process group."""
    previous = sys.excepthook

    def restore() -> None:
        if getattr(sys.excepthook, "__module__", "").startswith("torch."):
            sys.excepthook = previous

    return restore
