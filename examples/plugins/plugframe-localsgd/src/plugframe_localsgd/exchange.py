"""Communication: average parameters and optimizer states over ranks, broadcast buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

#: Bytes per collective: small tensors share one, and the flat copy stays small.
_BUCKET_BYTES = 64 * 2**20


def means(tensors: Sequence[Tensor], hooks: Any) -> list[Tensor]:
    """Return the mean over ranks of each tensor; shapes must be equal on all ranks."""
    result: dict[int, Tensor] = {}
    for indices in _buckets(tensors):
        mean = hooks.collective_all_reduce(tensor=_flat(tensors, indices), op="mean", group=None)
        result.update(_pieces(mean, tensors, indices))
    return [result[index] for index in range(len(tensors))]


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor], hooks: Any) -> None:
    """Broadcast the values of rank 0 in slot."""
    for indices in _buckets(tensors):
        flat = hooks.collective_broadcast(tensor=_flat(tensors, indices), src=0, group=None)
        for index, piece in _pieces(flat, tensors, indices):
            tensors[index].copy_(piece)


@torch.no_grad()
def average_state(optimizer: Optimizer, device: torch.device, hooks: Any) -> None:
    """Average the floating-point optimizer state over ranks in slot, such as Adam's moments.

    A rank without a gradient for a parameter may lack its state: the mean is over the ranks that have it. Other values
    (a count, a flag) are those of the first rank that has them.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # A slot is (parameter index, state key).
    own = {(n, key): value for n, p in enumerate(parameters) for key, value in optimizer.state.get(p, {}).items()}
    everyone = hooks.collective_all_gather_object(obj={slot: _meta(value) for slot, value in own.items()}, group=None)
    common = {slot: meta for entries in reversed(everyone) for slot, meta in entries.items()}
    slots = [slot for slot in sorted(common, key=str) if isinstance(common[slot], _TensorMeta)]
    local = [own[slot].to(device) if slot in own else common[slot].zeros(device) for slot in slots]
    for slot, mean in zip(slots, means(local, hooks), strict=True):
        missing_factor = len(everyone) / sum(slot in entries for entries in everyone)
        target = own.get(slot)
        if target is None:
            target = own[slot] = common[slot].zeros(device if common[slot].on_device else torch.device("cpu"))
        target.copy_(mean if missing_factor == 1 else mean * missing_factor)
    for index, key in sorted(common, key=str):
        meta = common[index, key]
        value = own[index, key] if isinstance(meta, _TensorMeta) else meta
        optimizer.state[parameters[index]][key] = value


class _TensorMeta:
    """Shape, dtype and placement of a tensor in the optimizer state of a rank."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        # Adam's step count is on the CPU, whatever the device of the parameters.
        self.on_device = tensor.device.type != "cpu"

    def zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


def _meta(value: Any) -> Any:
    return _TensorMeta(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield buckets: indices of tensors of one dtype, up to `_BUCKET_BYTES`."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[int] = []
        size = 0
        for index, tensor in enumerate(tensors):
            if tensor.dtype is dtype:
                bucket.append(index)
                size += tensor.numel() * tensor.element_size()
                if size >= _BUCKET_BYTES:
                    yield bucket
                    bucket, size = [], 0
        if bucket:
            yield bucket


def _flat(tensors: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    return torch.cat([tensors[index].detach().reshape(-1) for index in indices])


def _pieces(flat: Tensor, tensors: Sequence[Tensor], indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    sizes = [tensors[index].numel() for index in indices]
    for index, piece in zip(indices, torch.split(flat, sizes), strict=True):
        yield index, piece.view(tensors[index].shape)
