"""What goes between the ranks: means of parameters, buffers of rank 0, and the state of optimizers for a save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

#: Bytes of one exchange: many small tensors go together, and the copy they make stays small.
_BUCKET_BYTES = 64 * 2**20


def means(tensors: Sequence[Tensor], hooks: Any) -> list[Tensor]:
    """Return the means over the ranks of tensors that have the same shapes on all."""
    found: dict[int, Tensor] = {}
    for numbers in _buckets(tensors):
        mean = hooks.collective_all_reduce(tensor=_flat(tensors, numbers), op="mean", group=None)
        found.update(_pieces(mean, tensors, numbers))
    return [found[number] for number in range(len(tensors))]


@torch.no_grad()
def take_over(tensors: Sequence[Tensor], hooks: Any) -> None:
    """Give every rank the values of rank 0."""
    for numbers in _buckets(tensors):
        flat = hooks.collective_broadcast(tensor=_flat(tensors, numbers), src=0, group=None)
        for number, piece in _pieces(flat, tensors, numbers):
            tensors[number].copy_(piece)


@torch.no_grad()
def average_state(optimizer: Optimizer, device: torch.device, hooks: Any) -> None:
    """Give every rank the mean of the numbers the ranks' optimizers keep, such as Adam's moments.

    A rank whose parameter never had a gradient may lack what others have: the mean is over those that have it. What
    has no mean (a count, a flag) is that of the first rank that has it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {(n, key): value for n, p in enumerate(parameters) for key, value in optimizer.state.get(p, {}).items()}
    everyone = hooks.collective_all_gather_object(obj={at: _outline(value) for at, value in own.items()}, group=None)
    common = {at: outline for told in reversed(everyone) for at, outline in told.items()}
    places = [at for at in sorted(common, key=str) if isinstance(common[at], _Outline)]
    held = [own[at].to(device) if at in own else common[at].zeros(device) for at in places]
    for at, mean in zip(places, means(held, hooks), strict=True):
        shared = len(everyone) / sum(at in told for told in everyone)
        target = own.get(at)
        if target is None:
            target = own[at] = common[at].zeros(device if common[at].beside else torch.device("cpu"))
        target.copy_(mean if shared == 1 else mean * shared)
    for number, key in sorted(common, key=str):
        outline = common[number, key]
        value = own[number, key] if isinstance(outline, _Outline) else outline
        optimizer.state[parameters[number]][key] = value


class _Outline:
    """What a rank tells of a tensor it keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        # Adam keeps its count of steps on the CPU, whatever the device of the parameters.
        self.beside = tensor.device.type != "cpu"

    def zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


def _outline(value: Any) -> Any:
    return _Outline(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the numbers of tensors that go together: of one dtype, and not too many."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[int] = []
        size = 0
        for number, tensor in enumerate(tensors):
            if tensor.dtype is dtype:
                bucket.append(number)
                size += tensor.numel() * tensor.element_size()
                if size >= _BUCKET_BYTES:
                    yield bucket
                    bucket, size = [], 0
        if bucket:
            yield bucket


def _flat(tensors: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
    return torch.cat([tensors[number].detach().reshape(-1) for number in numbers])


def _pieces(flat: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    sizes = [tensors[number].numel() for number in numbers]
    for number, piece in zip(numbers, torch.split(flat, sizes), strict=True):
        yield number, piece.view(tensors[number].shape)
