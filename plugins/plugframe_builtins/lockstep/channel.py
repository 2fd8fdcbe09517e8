"""A separate communication channel between ranks."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from plugframe.hooks.context import Context
from plugframe_builtins._shared.torch_collective.compat import all_gather_single
from plugframe_builtins._shared.torch_collective.connection import host_backend

#: Bytes of the first message; longer texts need a second exchange.
_WIDTH = 512
_DEFAULT_TIMEOUT_S = 1800.0


class Channel:
    """Exchange short texts between all ranks on the host."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    @classmethod
    def open(cls, context: Context) -> Channel | None:
        """Open a channel; None if the collective has no process group."""
        if context.hooks.collective_process_group() is None:
            return None
        timeout = timedelta(seconds=context.timeout_s or _DEFAULT_TIMEOUT_S)
        group: Any = dist.new_group(backend=host_backend(), timeout=timeout)
        return cls(group)

    def close(self) -> None:
        """Close the channel: waiting ranks get an error."""
        if dist.is_initialized():
            dist.destroy_process_group(self._group)

    def exchange(self, text: str) -> list[str] | None:
        """Return the texts of all ranks, in rank order; None if all equal this rank's."""
        data = text.encode()
        mine = self._gathered(data[:_WIDTH].ljust(_WIDTH))
        if all(each == mine[self._group.rank()] for each in mine) and len(data) <= _WIDTH:
            return None
        sizes = [int(each) for each in self._gathered(b"%12d" % len(data))]
        rests = self._gathered(data.ljust(max(sizes)))
        return [rest[:size].decode() for rest, size in zip(rests, sizes, strict=True)]

    def _gathered(self, data: bytes) -> list[bytes]:
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        everyone = mine.new_empty(self._group.size() * len(data))
        all_gather_single(everyone, mine, group=self._group)
        if bool((everyone.view(-1, len(data)) == mine).all()):
            return [data] * self._group.size()
        return [bytes(row) for row in everyone.view(-1, len(data)).tolist()]
