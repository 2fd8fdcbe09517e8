"""The collective over ``torch.distributed``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plugframe.base import Collective, job_token
from plugframe.errors import CollectiveMismatchError, OrderError, SettingError
from plugframe.hooks import ReduceOp, hookimpl
from plugframe.hooks.context import Context
from plugframe.hooks.option import validate_options
from plugframe.utils.logging import warn_caller
from plugframe.utils.rank_text import ranks_text
from plugframe_builtins._shared.torch_collective.call_check import ROOM, agree
from plugframe_builtins._shared.torch_collective.compat import all_gather_single, reduce_scatter_single
from plugframe_builtins._shared.torch_collective.connection import backends, check_existing, connected, loopback_only
from plugframe_builtins._shared.torch_collective.fork import keep_groups_of_the_parent
from plugframe_builtins._shared.torch_collective.objects import ObjectMessage
from plugframe_builtins._shared.torch_collective.options import OPTIONS
from plugframe_builtins._shared.torch_collective.reduction import Reduction

DEFAULT_TIMEOUT_S = 1800.0


class ProcessGroupCollective(Collective):
    """Send tensors and objects through a ``torch.distributed`` process group.

    An existing process group is used unchanged, and survives tear-down. Every collective on
    tensors first compares the calls of the ranks, so that a difference raises on all of them.

    Args:
        backend: a ``torch.distributed`` backend, ``"gloo"`` or by device ``"cpu:gloo,cuda:nccl"``; by default
            the accelerator's.
        timeout_s: timeout of a collective in seconds; by default ``--timeout``, else 1800.
    """

    def __init__(self, *, backend: str | None = None, timeout_s: float | None = None) -> None:
        validate_options(self, OPTIONS, backend=backend, timeout_s=timeout_s)
        self.backend = backend
        self.timeout_s = timeout_s
        self._undo = ExitStack()
        self._words: dist.ProcessGroup | None = None
        self._side: Any = None
        self._timeout = timedelta(seconds=DEFAULT_TIMEOUT_S)
        self._types: frozenset[str] = frozenset()
        self._barriers = 0
        self._token = b""

    @hookimpl
    def collective_setup(self, context: Context) -> None:
        if self.timeout_s and context.timeout_s and self.timeout_s != context.timeout_s:
            raise SettingError(
                f"timeout_s={self.timeout_s:g} of the torch collective contradicts --timeout {context.timeout_s:g}: "
                "give one of them."
            )
        super().collective_setup(context)
        keep_groups_of_the_parent()
        timeout_s = self.timeout_s or context.timeout_s or DEFAULT_TIMEOUT_S
        self._timeout = timedelta(seconds=timeout_s)
        with ExitStack() as stack:
            stack.enter_context(loopback_only(context))
            if dist.is_initialized():
                check_existing(context)
                self._warn_ignored()
            else:
                backend = self.backend or context.hooks.accelerator_collective_backend()
                stack.enter_context(connected(context, backend=backend, timeout_s=timeout_s))
            self._types = frozenset(backends(dist.get_backend_config()))
            self._token = job_token(_store(), context.world.global_rank) if context.world.world_size > 1 else b""
            if context.device.type == "cpu" and context.world.world_size > 1:
                # A strategy's collectives in forward and backward must not interleave with the call checks:
                # different sizes abort the process.
                words: Any = dist.new_group(timeout=timedelta(seconds=timeout_s))
                self._words = words
                stack.callback(self._forget_words)
            self._undo = stack.pop_all()

    def _forget_words(self) -> None:
        group, self._words = self._words, None
        if dist.is_initialized():
            dist.destroy_process_group(group)

    def _warn_ignored(self) -> None:
        given = {"backend": self.backend, "timeout_s": self.timeout_s or self.context.timeout_s}
        ignored = [f"{name}={value!r}" for name, value in given.items() if value]
        if ignored and self.context.world.global_rank == 0:
            warn_caller(
                f"{' and '.join(ignored)} of the torch collective have no effect: torch.distributed was "
                "initialised before, and its process group is used as it is."
            )

    @hookimpl
    def collective_teardown(self) -> None:
        self._types = frozenset()
        self._undo.close()

    @hookimpl
    def collective_all_gather(self, tensor: Tensor, group: Any, sync_grads: bool) -> Tensor:
        peers = self._peers(group)
        if sync_grads:
            self._agree("all_gather with gradients", tensor, peers)
            return _gather_with_grads(tensor, self, peers)
        rows = self._agree("all_gather", tensor, peers, carry=self._small_payload(tensor))
        if rows is not None:
            everyone: Tensor = rows.view(tensor.dtype).view(peers.size(), *tensor.shape)
            return everyone.to(tensor.device)
        return self._gather(tensor, peers)

    def _gather(self, tensor: Tensor, peers: dist.ProcessGroup) -> Tensor:
        mine = self._wire(_flat(tensor))
        everyone = mine.new_empty(peers.size() * mine.numel())
        if mine.numel():
            # As bytes: a gather computes nothing, so that any dtype works with any backend.
            all_gather_single(everyone.view(torch.uint8), mine.view(torch.uint8), group=peers)
        return everyone.view(peers.size(), *tensor.shape).to(tensor.device)

    @hookimpl
    def collective_all_reduce(self, tensor: Tensor, op: ReduceOp, group: Any) -> Tensor:
        peers = self._peers(group)
        try:
            reduction = Reduction(op, tensor)
        except Exception:
            self._agree(f"all_reduce({op})", tensor, peers)  # otherwise the other ranks would wait
            raise
        rows = self._agree(f"all_reduce({op})", tensor, peers, carry=self._small_payload(reduction.send))
        if rows is not None:
            result = reduction.combine(rows)
            return reduction.receive(result.to(tensor.device), shape=tensor.shape, size=peers.size())
        result = self._wire(reduction.send)
        if result.numel():
            dist.all_reduce(result, reduction.op, group=peers)
        return reduction.receive(result.to(tensor.device), shape=tensor.shape, size=peers.size())

    @hookimpl
    def collective_reduce_scatter(self, tensor: Tensor, op: ReduceOp, group: Any) -> Tensor:
        peers = self._peers(group)
        self._agree(f"reduce_scatter({op})", tensor, peers)
        if tensor.shape[:1] != (peers.size(),):
            size, shape = peers.size(), tuple(tensor.shape)
            raise SettingError(f"reduce_scatter over {size} ranks takes shape ({size}, …), got {shape}.")
        reduction = Reduction(op, tensor)
        rows = self._wire(reduction.send)
        mine = rows.new_empty(rows.numel() // peers.size())
        if mine.numel():
            reduce_scatter_single(mine, rows, reduction.op, group=peers)
        return reduction.receive(mine.to(tensor.device), shape=tensor.shape[1:], size=peers.size())

    @hookimpl
    def collective_broadcast(self, tensor: Tensor, src: int, group: Any) -> Tensor:
        peers = self._peers(group, src)
        rows = self._agree(f"broadcast(src={src})", tensor, peers, carry=self._small_payload(tensor))
        if rows is not None:
            row: Tensor = rows[dist.get_process_group_ranks(peers).index(src)].clone()
            return row.view(tensor.dtype).view(tensor.shape).to(tensor.device)
        result = self._wire(_flat(tensor).clone())
        if result.numel():
            dist.broadcast(result.view(torch.uint8), src, group=peers)
        return result.view(tensor.shape).to(tensor.device)

    @hookimpl
    def collective_all_gather_object(self, obj: Any, group: Any) -> list[Any]:
        peers = self._peers(group)
        parcel = ObjectMessage(obj, self._token)
        rows = self._agree("all_gather_object", None, peers, carry=parcel.carry)
        return parcel.gathered(rows, group=peers, device=self._wire_device())

    @hookimpl
    def collective_broadcast_object(self, obj: Any, src: int, group: Any) -> Any:
        peers = self._peers(group, src)
        here = dist.get_rank() == src
        parcel = ObjectMessage(obj, self._token, sends=here)
        rows = self._agree(f"broadcast_object(src={src})", None, peers, carry=parcel.carry)
        found = parcel.broadcast(rows, src, group=peers, device=self._wire_device())
        return obj if here else found

    @hookimpl
    def collective_gather_later(self, values: Sequence[float]) -> Callable[[], Sequence[Sequence[float]]] | None:
        if self._side is None:
            if "gloo" not in backends(dist.get_backend_config()).values():
                return None
            # Separate connections: these numbers must not interleave with other collectives.
            self._side = dist.new_group(backend="gloo", timeout=self._timeout)
            self._undo.callback(self._forget_side)
        mine = torch.tensor(values, dtype=torch.float64)
        rows = mine.new_empty(self._side.size() * len(values))
        work: Any = all_gather_single(rows, mine, group=self._side, async_op=True)

        def wait() -> Sequence[Sequence[float]]:
            work.wait()
            return rows.view(-1, len(values)).tolist()

        return wait

    def _forget_side(self) -> None:
        group, self._side = self._side, None
        if dist.is_initialized():
            dist.destroy_process_group(group)

    @hookimpl
    def collective_barrier(self, name: str, group: Any) -> None:
        peers = self._peers(group)
        try:
            self._agree("barrier", None, peers)
            if self._wire_device().type != "cpu":  # on the CPU the check itself is a barrier
                dist.barrier(group=peers)
        except CollectiveMismatchError:
            raise
        except RuntimeError as error:
            raise RuntimeError(f"The barrier {name!r} failed on rank {dist.get_rank()}: {error}") from error

    @hookimpl
    def collective_monitored_barrier(self, name: str, timeout_s: float) -> None:
        # Through the store rather than the backend: this works for every backend, names the missing ranks
        # on all others, rank 0 included, and keeps the connections usable.
        store = self._peers(None).get_group_store()
        self._barriers += 1
        key = f"plugframe/barrier/{self._barriers}"
        store.set(f"{key}/{dist.get_rank()}", name)
        missing = list(range(dist.get_world_size()))
        deadline, pause_s = time.monotonic() + timeout_s, 0.001
        while missing := [rank for rank in missing if not store.check([f"{key}/{rank}"])]:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"The barrier {name!r} waited {timeout_s:g} s on rank {dist.get_rank()}: "
                    f"missing {ranks_text(missing)}."
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)
        # All ranks are here, so none waits at the previous barrier any more.
        store.delete_key(f"plugframe/barrier/{self._barriers - 1}/{dist.get_rank()}")

    @hookimpl
    def collective_new_group(self, ranks: Sequence[int]) -> Any:
        return dist.new_group(list(ranks))

    @hookimpl
    def collective_process_group(self) -> Any:
        return dist.group.WORLD if self._types else None

    def _peers(self, group: Any, src: int | None = None) -> dist.ProcessGroup:
        """Return the process group of `group`; this rank and `src` must be members."""
        peers = dist.group.WORLD if group is None else group
        if peers is None and self._types:
            raise OrderError(
                "The process group of this job is gone: another Lite, or the script, made it and has destroyed it "
                "before this Lite was torn down. Tear down the one that made it last."
            )
        if peers is None:
            raise OrderError("The torch collective is not set up: call lite.launch() first.")
        if dist.get_rank(peers) < 0:
            raise SettingError(f"Rank {dist.get_rank()} is not in this group: let only its members call.")
        if src is not None and src not in dist.get_process_group_ranks(peers):
            members = ", ".join(map(str, dist.get_process_group_ranks(peers)))
            raise SettingError(f"src={src} is not in this group, which has the ranks {members} of the job.")
        return peers

    def _agree(self, call: str, tensor: Tensor | None, peers: dist.ProcessGroup, carry: Any = None) -> Any:
        """Compare the ranks' calls; return every rank's payload, None if this rank sends none."""
        group = self._words if self._words is not None and peers is dist.group.WORLD else peers
        # On the CPU if the group supports it: reading the result does not wait for the accelerator's stream.
        rows = agree(call, tensor, group, self._wire_device(), carry=carry)
        if tensor is not None and tensor.layout is not torch.strided:
            raise SettingError(f"{call} takes dense tensors, got {tensor.layout}: use tensor.to_dense() first.")
        return None if carry is None else rows

    def _small_payload(self, tensor: Tensor) -> Tensor | None:
        """Return the bytes of a small tensor on the device of the call check, None for others."""
        if tensor.layout is not torch.strided or not 0 < tensor.nbytes <= ROOM:
            return None
        return _flat(tensor).view(torch.uint8) if tensor.device.type == self._wire_device().type else None

    def _wire(self, tensor: Tensor) -> Tensor:
        """Return `tensor` on a device that this backend supports."""
        if tensor.device.type in self._types:
            return tensor
        return tensor.to(self._wire_device())

    def _wire_device(self) -> torch.device:
        """Return the CPU if this backend supports it, else this rank's device."""
        return torch.device("cpu") if "cpu" in self._types else self.context.device


def _store() -> Any:
    group: Any = dist.group.WORLD
    return group.get_group_store() if hasattr(group, "get_group_store") else None


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)


class _Gather(torch.autograd.Function):
    """All-gather; its backward returns the sum of the gradients of this rank's row."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, collective: ProcessGroupCollective, peers: dist.ProcessGroup) -> Tensor:
        ctx.rest = collective, peers
        return collective._gather(tensor, peers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, None, None]:
        return _Scatter.apply(grads[0], *ctx.rest), None, None  # type: ignore[no-untyped-call]


class _Scatter(torch.autograd.Function):
    """Reduce-scatter by sum, the transpose of all-gather, so that second derivatives are correct."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, collective: ProcessGroupCollective, peers: dist.ProcessGroup) -> Tensor:
        ctx.rest = collective, peers
        return collective.collective_reduce_scatter(tensor=rows, op="sum", group=peers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, None, None]:
        return _gather_with_grads(grads[0], *ctx.rest), None, None


def _gather_with_grads(tensor: Tensor, collective: ProcessGroupCollective, peers: dist.ProcessGroup) -> Tensor:
    result: Tensor = _Gather.apply(tensor, collective, peers)  # type: ignore[no-untyped-call]
    return result
