"""Send objects as bytes. torch's object collectives use NumPy, which need not be installed.

The length of each rank's object, and the object itself if it is short, travels with the call check; only
longer objects take a collective of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plugframe.base import pack, unpack
from plugframe.checkpoint import as_bytes
from plugframe.errors import CollectiveMismatchError
from plugframe_builtins._shared.torch_collective.call_check import ROOM
from plugframe_builtins._shared.torch_collective.compat import all_gather_single

#: Bytes of the length field.
_HEAD = 8


class ObjectMessage:
    """A pickled object to send, and the objects received.

    Attributes:
        carry: payload of the call check: dtype uint8, shape (n,).
    """

    def __init__(self, obj: Any, token: bytes, *, sends: bool = True) -> None:
        self._token = token
        self.error: Exception | None = None
        self._data = b""
        try:
            self._data = pack(obj, token) if sends else b""
            length = len(self._data)
        except Exception as error:  # noqa: BLE001 - an object may raise anything; the other ranks wait
            self.error = error
            self._data = f"{type(error).__name__}: {error}".encode()[: ROOM - _HEAD]
            length = -len(self._data)
        head = length.to_bytes(_HEAD, "little", signed=True) + self._data[: ROOM - _HEAD]
        self.carry = torch.frombuffer(bytearray(head.ljust(ROOM, b"\0")), dtype=torch.uint8)

    def gathered(self, rows: Tensor, *, group: dist.ProcessGroup, device: torch.device) -> list[Any]:
        """Return every rank's object, given the payloads; all members of `group` must call it."""
        rows, sizes = self._opened(rows, group)
        length = max(sizes)
        if length > ROOM - _HEAD:
            padded = self._tensor(length, device)
            everyone = padded.new_empty(group.size() * length)
            all_gather_single(everyone, padded, group=group)
            rows = everyone.cpu().view(group.size(), length)
        else:
            rows = rows[:, _HEAD:]
        return [self._unpacked(row[:size]) for row, size in zip(rows, sizes, strict=True)]

    def gathered_on(
        self, rows: Tensor, dst: int, *, group: dist.ProcessGroup, device: torch.device
    ) -> list[Any] | None:
        """Return every rank's object on global rank `dst`, None elsewhere; all members of `group` must call it."""
        here = dist.get_rank() == dst
        rows, sizes = self._opened(rows, group)
        length = max(sizes)
        if length > ROOM - _HEAD:
            padded = self._tensor(length, device)
            everyone = padded.new_zeros(group.size() if here else 0, length)
            dist.gather(padded, list(everyone.unbind()) or None, dst, group=group)
            rows = everyone.cpu()
        else:
            rows = rows[:, _HEAD:]
        return [self._unpacked(row[:size]) for row, size in zip(rows, sizes, strict=True)] if here else None

    def broadcast(self, rows: Tensor, src: int, *, group: dist.ProcessGroup, device: torch.device) -> Any:
        """Return the object of global rank `src`; all members of `group` must call it."""
        rows, sizes = self._opened(rows, group)
        source = dist.get_process_group_ranks(group).index(src)
        size = sizes[source]
        if size <= ROOM - _HEAD:
            return self._unpacked(rows[source, _HEAD : _HEAD + size])
        data = self._tensor(size, device)
        dist.broadcast(data, src, group=group)
        return self._unpacked(data.cpu())

    def _opened(self, rows: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[int]]:
        if self.error is not None:
            raise CollectiveMismatchError(
                f"This object cannot be sent to other ranks: {type(self.error).__name__}: {self.error}. Send values, "
                "or an object of a class at the top level of a module."
            ) from self.error
        rows = rows.cpu()
        sizes: list[int] = rows[:, :_HEAD].contiguous().view(torch.int64).flatten().tolist()
        for rank, row, size in zip(dist.get_process_group_ranks(group), rows, sizes, strict=True):
            if size < 0:
                text = bytes(row[_HEAD : _HEAD - size].tolist()).decode(errors="replace")
                raise CollectiveMismatchError(f"Rank {rank} could not send its object: {text}")
        return rows, sizes

    def _tensor(self, length: int, device: torch.device) -> Tensor:
        padded = bytearray(self._data.ljust(length, b"\0"))
        return torch.frombuffer(padded, dtype=torch.uint8).to(device)

    def _unpacked(self, data: Tensor) -> Any:
        data = data.contiguous()
        return unpack(bytes(as_bytes(data)), self._token)
