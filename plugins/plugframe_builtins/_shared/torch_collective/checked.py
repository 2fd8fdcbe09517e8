"""A process group whose calls are compared over ranks before tensors are sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plugframe.base import Collective
from plugframe.errors import OrderError, SettingError
from plugframe_builtins._shared.torch_collective.call_check import ROOM, agree
from plugframe_builtins._shared.torch_collective.compat import all_gather_single


class CheckedGroup(Collective):
    """What all collectives over ``torch.distributed`` share: groups, call checks and devices."""

    def __init__(self) -> None:
        self._words: dist.ProcessGroup | None = None
        self._types: frozenset[str] = frozenset()
        self._routes: frozenset[str] = frozenset()
        self._token = b""

    def _use(self, by_device: Mapping[str, str]) -> None:
        """Set the backend of each device type."""
        self._types = frozenset(by_device)
        # Gloo reduces and gathers the memory of a GPU, but sends, scatters and exchanges that of the host only.
        self._routes = frozenset(kind for kind, name in by_device.items() if kind == "cpu" or name != "gloo")

    def _peers(self, group: Any, member: int | None = None, name: str = "src") -> dist.ProcessGroup:
        """Return the process group of `group`; this rank and global rank `member` must be in it."""
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
        if member is not None and member not in dist.get_process_group_ranks(peers):
            members = ", ".join(map(str, dist.get_process_group_ranks(peers)))
            raise SettingError(f"{name}={member} is not in this group, which has the ranks {members} of the job.")
        return peers

    def _agree(
        self, call: str, tensor: Tensor | None, peers: dist.ProcessGroup, carry: Tensor | None = None, shape: str = ""
    ) -> Any:
        """Compare the ranks' calls; return every rank's payload, None if this rank sends none."""
        # On the CPU if the group supports it: reading the result does not wait for the accelerator's stream.
        rows = agree(call, tensor, self._check_group(peers), self._wire_device(), carry=carry, shape=shape)
        if tensor is not None:
            check_dense(call, tensor)
        return None if carry is None else rows

    def _check_group(self, peers: dist.ProcessGroup) -> dist.ProcessGroup:
        """Return the group through which the calls of `peers` are compared."""
        return self._words if self._words is not None and peers is dist.group.WORLD else peers

    def _small_payload(self, tensor: Tensor) -> Tensor | None:
        """Return the bytes of a small tensor on the device of the call check, None for others."""
        if tensor.layout is not torch.strided or not 0 < tensor.nbytes <= ROOM:
            return None
        return flat(tensor).view(torch.uint8) if tensor.device.type == self._wire_device().type else None

    def _wire(self, tensor: Tensor) -> Tensor:
        """Return `tensor` on a device that this backend supports."""
        if tensor.device.type in self._types:
            return tensor
        return tensor.to(self._wire_device())

    def _wire_device(self) -> torch.device:
        """Return the CPU if this backend supports it, else this rank's device."""
        return torch.device("cpu") if "cpu" in self._types else self.context.device

    def _gather_bytes(self, tensor: Tensor, peers: dist.ProcessGroup) -> Tensor:
        mine = self._wire(flat(tensor))
        everyone = mine.new_empty(peers.size() * mine.numel())
        if mine.numel():
            # As bytes: a gather computes nothing, so that any dtype works with any backend.
            all_gather_single(everyone.view(torch.uint8), mine.view(torch.uint8), group=peers)
        return everyone.view(peers.size(), *tensor.shape).to(tensor.device)


def flat(tensor: Tensor) -> Tensor:
    """Return the values as a contiguous tensor of one dimension, without gradients; it may share memory."""
    found = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    return found if found.numel() else found.new_empty(0)  # an empty tensor may have strides that bytes cannot have


def check_dense(call: str, tensor: Tensor) -> None:
    """Raise a SettingError for a sparse tensor."""
    if tensor.layout is not torch.strided:
        raise SettingError(f"{call} takes dense tensors, got {tensor.layout}: use tensor.to_dense() first.")
