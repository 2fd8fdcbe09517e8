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

from plugframe.base import job_token
from plugframe.errors import CollectiveMismatchError, SettingError
from plugframe.hooks import ReduceOp, hookimpl
from plugframe.hooks.context import Context
from plugframe.hooks.option import validate_options
from plugframe.utils.logging import warn_caller
from plugframe.utils.rank_text import ranks_text
from plugframe_builtins._shared.torch_collective.checked import flat
from plugframe_builtins._shared.torch_collective.compat import all_gather_single, reduce_scatter_single
from plugframe_builtins._shared.torch_collective.connection import backends, check_existing, connected, loopback_only
from plugframe_builtins._shared.torch_collective.fork import keep_groups_of_the_parent
from plugframe_builtins._shared.torch_collective.gradients import linear
from plugframe_builtins._shared.torch_collective.objects import ObjectMessage
from plugframe_builtins._shared.torch_collective.options import OPTIONS
from plugframe_builtins._shared.torch_collective.reduction import Reduction
from plugframe_builtins._shared.torch_collective.routing import Routing

DEFAULT_TIMEOUT_S = 1800.0


class ProcessGroupCollective(Routing):
    """Send tensors and objects through a ``torch.distributed`` process group.

    An existing process group is used unchanged, and survives tear-down. Every collective on
    tensors first compares the calls of the ranks, so that a difference raises on all of them.

    Args:
        backend: a ``torch.distributed`` backend, ``"gloo"`` or by device ``"cpu:gloo,cuda:nccl"``; by default
            the accelerator's.
        timeout_s: timeout of a collective in seconds; by default ``--timeout``, else 1800.
    """

    def __init__(self, *, backend: str | None = None, timeout_s: float | None = None) -> None:
        super().__init__()
        validate_options(self, OPTIONS, backend=backend, timeout_s=timeout_s)
        self.backend = backend
        self.timeout_s = timeout_s
        self._undo = ExitStack()
        self._side: Any = None
        self._timeout = timedelta(seconds=DEFAULT_TIMEOUT_S)
        self._barriers = 0

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
            self._use(backends(dist.get_backend_config()))
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
        self._use({})
        self._undo.close()

    @hookimpl
    def collective_all_gather(self, tensor: Tensor, group: Any, sync_grads: bool) -> Tensor:
        peers = self._peers(group)
        if sync_grads:
            self._agree("all_gather with gradients", tensor, peers)
            return linear(
                tensor,
                lambda mine: self._gather_bytes(mine, peers),
                lambda rows: self.collective_reduce_scatter(tensor=rows, op="sum", group=peers),
            )
        rows = self._agree("all_gather", tensor, peers, carry=self._small_payload(tensor))
        if rows is not None:
            everyone: Tensor = rows.view(tensor.dtype).view(peers.size(), *tensor.shape)
            return everyone.to(tensor.device)
        return self._gather_bytes(tensor, peers)

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
        result = self._wire(flat(tensor).clone())
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


def _store() -> Any:
    group: Any = dist.group.WORLD
    return group.get_group_store() if hasattr(group, "get_group_store") else None
