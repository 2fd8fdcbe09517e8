"""Collectives that send without computing: from one rank to another, to or from one rank, and from all to all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plugframe.base import check_split
from plugframe.errors import SettingError
from plugframe.hooks import hookimpl
from plugframe_builtins._shared.torch_collective.call_check import ROOM
from plugframe_builtins._shared.torch_collective.checked import CheckedGroup, check_dense, flat
from plugframe_builtins._shared.torch_collective.gradients import linear
from plugframe_builtins._shared.torch_collective.objects import ObjectMessage
from plugframe_builtins._shared.torch_collective.point_to_point import Message
from plugframe_builtins._shared.torch_collective.splits import Split, check_sizes


class Routing(CheckedGroup):
    """The collectives of contract 2. Tensors travel as bytes, so that any dtype works with any backend."""

    @hookimpl
    def collective_send(self, tensor: Tensor, dst: int, tag: int, group: Any) -> None:
        peers, sent = self._meet(Message(role="send", peer=dst, tag=tag, tensor=tensor), group)
        if sent is None and tensor.nbytes:
            dist.send(self._route(flat(tensor)).view(torch.uint8), dst, group=peers)

    @hookimpl
    def collective_recv(self, tensor: Tensor, src: int, tag: int, group: Any) -> Tensor:
        peers, received = self._meet(Message(role="recv", peer=src, tag=tag, tensor=tensor), group)
        if received is None:
            received = self._zero_bytes(tensor.nbytes, tensor.device)
            if tensor.nbytes:
                dist.recv(received, src, group=peers)
        return received.view(tensor.dtype).view(tensor.shape).to(tensor.device)

    def _meet(self, message: Message, group: Any) -> tuple[dist.ProcessGroup, Tensor | None]:
        """Compare a message's two calls; return the group, and the bytes of a small tensor, None for others."""
        name = "dst" if message.role == "send" else "src"
        peers = self._peers(group, message.peer, name)
        if message.peer == dist.get_rank():
            raise SettingError(f"{name}={message.peer} is this rank: a message is for another one.")
        carry = self._small_payload(message.tensor)
        if carry is not None and message.role == "recv":
            carry = torch.zeros_like(carry)  # the tensor gives a shape, and may be uninitialised
        received = self._compare(message, peers, carry)
        check_dense(message.role, message.tensor)
        return peers, received

    def _compare(self, message: Message, peers: dist.ProcessGroup, carry: Tensor | None) -> Tensor | None:
        """Compare a message's two calls, and return what the other rank sends along."""
        received = message.agree(self._check_group(peers), self._wire_device(), carry=carry)
        return None if carry is None else received

    @hookimpl
    def collective_all_to_all(
        self,
        tensor: Tensor,
        output_sizes: Sequence[int] | None,
        input_sizes: Sequence[int] | None,
        group: Any,
        sync_grads: bool,
    ) -> Tensor:
        peers = self._peers(group)
        try:
            sizes = check_split(tensor, peers.size(), output_sizes, input_sizes)
        except SettingError as error:
            self._agree(f"all_to_all refused ({error})", tensor, peers)  # otherwise the other ranks would wait
            raise
        split = None if sizes is None else Split(output=sizes[0], input=sizes[1])
        if sync_grads and tensor.requires_grad and torch.is_grad_enabled():
            return linear(
                tensor,
                lambda rows: self._exchange("all_to_all with gradients", rows, split, peers),
                lambda grads: self._exchange("backward of all_to_all", grads, split and split.back, peers),
            )
        return self._exchange("all_to_all", tensor, split, peers)

    def _exchange(self, call: str, tensor: Tensor, split: Split | None, peers: dist.ProcessGroup) -> Tensor:
        """Run an all-to-all once the ranks' calls and sizes are known to fit each other."""
        if split is None:
            rows = self._agree(call, tensor, peers, carry=self._small_payload(tensor))
            if rows is not None:
                everyone: Tensor = rows.view(tensor.dtype).view(peers.size(), *tensor.shape)
                return everyone[:, peers.rank()].contiguous().to(tensor.device)
            split = Split.even(peers.size())
        else:
            mine = split.as_bytes().to(self._wire_device())
            carry = mine if mine.numel() <= ROOM else None
            shape = f"({', '.join(['*', *map(str, tensor.shape[1:])])})"
            rows = self._agree(f"{call} with sizes", tensor, peers, carry=carry, shape=shape)
            self._check_sizes(self._gather_bytes(mine, peers) if carry is None else rows, peers)
        row = tensor.shape[1:].numel() * tensor.element_size()
        received = self._zero_bytes(sum(split.output) * row, tensor.device)
        if row:
            sent = self._route(flat(tensor)).view(torch.uint8)
            sizes = [row * size for size in split.output], [row * size for size in split.input]
            dist.all_to_all_single(received, sent, *sizes, group=peers)
        return received.view(tensor.dtype).view(sum(split.output), *tensor.shape[1:]).to(tensor.device)

    def _check_sizes(self, rows: Tensor, peers: dist.ProcessGroup) -> None:
        check_sizes(rows, dist.get_process_group_ranks(peers))

    @hookimpl
    def collective_scatter(self, tensor: Tensor, src: int, group: Any) -> Tensor:
        peers = self._peers(group, src)
        size, here = peers.size(), dist.get_rank() == src
        fits = not here or tensor.shape[:1] == (size,)
        row = tensor[0] if here and fits else tensor
        call = f"scatter(src={src})" if fits else f"scatter(src={src}) to {size} ranks"
        carry = self._small_stack(tensor if here else None, row, size) if fits else None
        stacks = self._agree(call, tensor, peers, carry=carry, shape=str(tuple(row.shape)))
        if not fits:
            raise SettingError(f"scatter over {size} ranks takes shape ({size}, …), got {tuple(tensor.shape)}.")
        if stacks is not None:
            mine: Tensor = stacks[dist.get_process_group_ranks(peers).index(src)].view(size, -1)[peers.rank()].clone()
        else:
            mine = self._zero_bytes(row.nbytes, tensor.device)
            if row.nbytes:
                rows = self._route(flat(tensor)).view(torch.uint8).view(size, -1).unbind() if here else ()
                dist.scatter(mine, list(rows) or None, src, group=peers)
        return mine.view(tensor.dtype).view(row.shape).to(tensor.device)

    def _small_stack(self, stack: Tensor | None, row: Tensor, size: int) -> Tensor | None:
        """Return the bytes of a small stack of rows, zeros where it is on another rank; None for a large one."""
        if stack is not None:
            return self._small_payload(stack)
        small = row.layout is torch.strided and 0 < row.nbytes * size <= ROOM
        same_device = row.device.type == self._wire_device().type
        return self._zero_bytes(row.nbytes * size, row.device) if small and same_device else None

    @hookimpl
    def collective_gather_object(self, obj: Any, dst: int, group: Any) -> list[Any] | None:
        peers = self._peers(group, dst, "dst")
        parcel = ObjectMessage(obj, self._token)
        rows = self._agree(f"gather_object(dst={dst})", None, peers, carry=parcel.carry)
        return parcel.gathered_on(rows, dst, group=peers, device=self._wire_device())

    def _route(self, tensor: Tensor) -> Tensor:
        """Return `tensor` on a device that the calls of this class support."""
        return tensor if tensor.device.type in self._routes else tensor.to(self._wire_device())

    def _zero_bytes(self, length: int, device: torch.device) -> Tensor:
        """Return bytes on `device`, or on one that the calls of this class support."""
        device = device if device.type in self._routes else self._wire_device()
        return torch.zeros(length, dtype=torch.uint8, device=device)
