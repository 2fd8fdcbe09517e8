"""Gradient compression."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plugframe.errors import MissingDependencyError, SettingError
from plugframe_builtins._shared.data_parallel.buckets import Bucket


def check_compression(kind: str | None, powersgd: Mapping[str, Any] | None) -> None:
    """Validate the settings, before there is a process group.

    Raises:
        SettingError: with the accepted values.
        MissingDependencyError: if torch's implementation needs a package that is not installed.
    """
    if powersgd is not None and kind != "powersgd":
        raise SettingError(f"powersgd={dict(powersgd)!r} has no effect: it goes with gradient_compression='powersgd'.")
    if kind == "powersgd" and importlib.util.find_spec("numpy") is None:
        raise MissingDependencyError("gradient_compression='powersgd' needs NumPy: pip install numpy.")


def make_sender(kind: str, powersgd: Mapping[str, Any], group: Any) -> Callable[[Bucket], Any]:
    """Return a function that sends a compressed bucket, with the compression's state.

    Raises:
        SettingError: for options `PowerSGDState` does not take.
    """
    if kind != "powersgd":
        dtype = torch.float16 if kind == "fp16" else torch.bfloat16
        return lambda bucket: _Rounded(bucket, dtype, group)
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    try:
        state = powerSGD_hook.PowerSGDState(group, **powersgd)
    except (TypeError, ValueError) as error:
        raise SettingError(f"powersgd={dict(powersgd)!r} does not fit torch's PowerSGDState: {error}") from error
    return lambda bucket: _Approximated(bucket, powerSGD_hook.powerSGD_hook, state, group)


class _Rounded:
    """A bucket sent in a lower-precision dtype."""

    def __init__(self, bucket: Bucket, dtype: torch.dtype, group: Any) -> None:
        self._flat = bucket.buffer
        narrows = self._flat.dtype.itemsize > dtype.itemsize
        self._sent = self._flat.to(dtype) if narrows else self._flat
        self._work: Any = dist.all_reduce(self._sent, group=group, async_op=True)

    def wait(self) -> None:
        self._work.wait()
        if self._sent is not self._flat:
            self._flat.copy_(self._sent)


class _Approximated:
    """A bucket sent by torch's PowerSGD hook, and the flags of its parameters sent beside it."""

    def __init__(self, bucket: Bucket, hook: Callable[..., Any], state: Any, group: Any) -> None:
        self._flags: Any = dist.all_reduce(bucket.flags, group=group, async_op=True)
        self._bucket = bucket
        # torch's hook sums and divides by the number of ranks; the buffer is divided already.
        self._future = hook(state, _TorchBucket(bucket, dist.get_world_size(group)))

    def wait(self) -> None:
        self._flags.wait()
        self._bucket.values.copy_(self._future.wait())


class _TorchBucket:
    """A bucket with the methods of torch's ``GradBucket``, which has no Python constructor."""

    def __init__(self, bucket: Bucket, size: int) -> None:
        self._bucket = bucket
        bucket.values.mul_(size)

    def buffer(self) -> Tensor:
        return self._bucket.values

    def gradients(self) -> list[Tensor]:
        return self._bucket.gradients()

    def parameters(self) -> list[nn.Parameter]:
        return self._bucket.parameters

    def index(self) -> int:
        return self._bucket.number

    def is_last(self) -> bool:
        return self._bucket.last
