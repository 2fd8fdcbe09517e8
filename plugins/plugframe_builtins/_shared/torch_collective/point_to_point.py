"""Messages between two ranks: their calls are compared before the tensor is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from plugframe.errors import CollectiveMismatchError
from plugframe_builtins._shared.torch_collective.call_check import WIDTH, decode, describe, encode

Role = Literal["send", "recv"]


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message, as one of its two ranks sees it.

    Attributes:
        role: what this rank does.
        peer: the other's global rank.
        tag: number that both calls must have.
        tensor: the tensor to send, or one with the shape, dtype and device of the tensor to receive.
    """

    role: Role
    peer: int
    tag: int
    tensor: Tensor

    def agree(self, group: dist.ProcessGroup, device: torch.device, *, carry: Tensor | None) -> Tensor:
        """Check that the other rank makes the counterpart of this call, before anything of unknown size is sent.

        Each rank sends a description of its call to the other, so that both find the same difference, also where
        both send.

        Args:
            group: the group that the descriptions travel through.
            device: a device that it supports.
            carry: payload sent along, of dtype uint8 and shape (n,) with n of at most `ROOM` of `call_check`.

        Returns:
            The bytes that the other rank sends along, of dtype uint8 and shape (n,), on `device`.

        Raises:
            CollectiveMismatchError: on both ranks, with the call of each.
        """
        me = dist.get_rank()
        mine = encode(_text(self.role, self.peer, self.tag, self.tensor)).to(device)
        if carry is not None:
            mine[WIDTH : WIDTH + carry.numel()] = carry
        theirs = torch.zeros_like(mine)
        # The lower rank sends first, whatever its role: both calls are known even if both send. One after the other:
        # both directions at once take gloo many times as long.
        if me < self.peer:
            dist.send(mine, self.peer, group=group)
        dist.recv(theirs, self.peer, group=group)
        if me > self.peer:
            dist.send(mine, self.peer, group=group)
        counterpart: Role = "recv" if self.role == "send" else "send"
        expected = encode(_text(counterpart, me, self.tag, self.tensor)).to(device)
        if torch.equal(theirs[:WIDTH], expected[:WIDTH]):
            return theirs[WIDTH : WIDTH + (0 if carry is None else carry.numel())].clone()
        texts = {me: decode(mine), self.peer: decode(theirs)}
        calls_text = "; ".join(f"rank {rank}: {texts[rank]}" for rank in sorted(texts))
        same_role = texts[self.peer].startswith(f"{self.role}(")
        fix = f"Let one of them {counterpart} first" if same_role else "Give send and recv one tag, shape and dtype"
        raise CollectiveMismatchError(f"Two ranks do not agree on a message: {calls_text}. {fix}.")


def _text(role: Role, peer: int, tag: int, tensor: Tensor) -> str:
    return describe(f"{role}({'dst' if role == 'send' else 'src'}={peer}, tag={tag})", tensor)
