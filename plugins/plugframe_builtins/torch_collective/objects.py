"""Objects as bytes. torch's own object collectives take them from tensors through NumPy, which need not be there."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plugframe.checkpoint import as_bytes
from plugframe_builtins.torch_collective.compat import all_gather_single


def all_gather(obj: Any, *, group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """Return every rank's object, in the order of the ranks of `group`; its members call it."""
    mine = _packed(obj)
    sizes = torch.empty(group.size(), dtype=torch.int64, device=device)
    all_gather_single(sizes, torch.tensor([mine.numel()], device=device), group=group)
    length = int(sizes.max())
    padded = torch.zeros(length, dtype=torch.uint8, device=device)
    padded[: mine.numel()] = mine
    everyone = torch.empty(group.size() * length, dtype=torch.uint8, device=device)
    all_gather_single(everyone, padded, group=group)
    rows = everyone.cpu().view(group.size(), length)
    return [_unpacked(row[:size]) for row, size in zip(rows, sizes.tolist(), strict=True)]


def broadcast(obj: Any, src: int, *, group: dist.ProcessGroup, device: torch.device) -> Any:
    """Return the object of rank `src` of the job; the members of `group` call it."""
    mine = _packed(obj) if dist.get_rank() == src else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([mine.numel()], device=device)
    dist.broadcast(size, src, group=group)
    data = mine.to(device) if dist.get_rank() == src else torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(data, src, group=group)
    return obj if dist.get_rank() == src else _unpacked(data.cpu())


def _packed(obj: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)


def _unpacked(data: Tensor) -> Any:
    return pickle.load(io.BytesIO(as_bytes(data.contiguous())))
