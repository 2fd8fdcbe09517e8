"""A way between ranks of its own, on which nothing else is ever sent."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from plugframe.hooks.context import Context
from plugframe_builtins._shared.torch_collective.compat import all_gather_single
from plugframe_builtins._shared.torch_collective.connection import host_backend

#: Bytes of a word on the wire; of a longer one the end follows in another exchange.
_WIDTH = 512
_DEFAULT_TIMEOUT_S = 1800.0


class Channel:
    """Exchanges short texts between all ranks of the job, on the host."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    @classmethod
    def open(cls, context: Context) -> Channel | None:
        """Open one; None where the collective has no process group to begin with."""
        if context.hooks.collective_process_group() is None:
            return None
        timeout = timedelta(seconds=context.timeout_s or _DEFAULT_TIMEOUT_S)
        group: Any = dist.new_group(backend=host_backend(), timeout=timeout)
        return cls(group)

    def close(self) -> None:
        """Close it: a rank that still waits notices."""
        if dist.is_initialized():
            dist.destroy_process_group(self._group)

    def exchange(self, text: str) -> list[str] | None:
        """Return the texts of all ranks, in their order; None if all are this one."""
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
