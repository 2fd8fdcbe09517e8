"""Batch normalisation over ranks on the CPU, and a line about one that is not over ranks."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from plugframe.utils.logging import tell


class _Sum(torch.autograd.Function):
    """The sum over ranks; gradients are summed likewise."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _sum(gradients[0], ctx.group), None


def _sum(values: Tensor, group: Any) -> Tensor:
    return cast("Tensor", _Sum.apply(values, group))  # type: ignore[no-untyped-call]


class CpuSyncBatchNorm(nn.SyncBatchNorm):
    """A ``SyncBatchNorm`` that also works on the CPU, where torch's raises (torch 2.13)."""

    def forward(self, input: Tensor) -> Tensor:
        group = self.process_group or (dist.group.WORLD if dist.is_initialized() else None)
        if not self.training or input.device.type != "cpu" or group is None or dist.get_world_size(group) < 2:
            return super().forward(input)
        self._check_input_dim(input)
        x = input.float() if input.dtype.itemsize < 4 else input
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        count = x.new_tensor([x.numel() / x.shape[1]])
        sums = _sum(torch.cat([x.sum(dims), count]), group)
        mean, total = sums[:-1] / sums[-1], sums[-1].detach()
        centred = x - mean.view(shape)
        variance = _sum(centred.square().sum(dims), group) / total
        self._track(mean.detach(), variance.detach() * total / (total - 1))
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1.0 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(variance.to(self.running_var.dtype), factor)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {key: value for key, value in self.__dict__.items() if key != "process_group"}
        return _restored, (state,)


def _restored(state: dict[str, Any]) -> nn.SyncBatchNorm:
    """Return torch's own layer for a copy or a pickle."""
    module: nn.SyncBatchNorm = object.__new__(nn.SyncBatchNorm)
    module.__dict__.update(state, process_group=None)
    return module


def use_cpu_sync_batch_norm(module: nn.Module) -> Callable[[], None] | None:
    """Make each ``SyncBatchNorm`` in `module` work on the CPU; return a function that undoes it, None without any."""
    changed = [child for child in module.modules() if type(child) is nn.SyncBatchNorm]
    for child in changed:
        cast("Any", child).__class__ = CpuSyncBatchNorm
    # Weak references: a model may go before the job ends.
    return functools.partial(_undo, list(map(weakref.ref, changed))) if changed else None


def _undo(changed: Sequence[weakref.ref[nn.Module]]) -> None:
    for reference in changed:
        child = reference()
        if type(child) is CpuSyncBatchNorm:
            cast("Any", child).__class__ = nn.SyncBatchNorm


def tell_of_local_batch_norm(module: nn.Module) -> None:
    """Report a batch normalisation in training that is not synchronised. Call it on one rank, if there are several."""
    for name, child in module.named_modules():
        if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm) and child.training:
            tell(
                f"{type(child).__name__} {name!r} of {type(module).__name__} normalises over the batch of each rank, "
                "so that results depend on the number of ranks. For the batch of all ranks, set up "
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).",
                warn=True,
            )
            return
