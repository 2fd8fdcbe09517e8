"""A backend of ``torch.distributed``: gloo on CPU views of device memory."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from plugframe_pydevice.backend import NAME
from plugframe_pydevice.kernels import host

BACKEND = "pydevice_gloo"

# Some were renamed in torch 2.13; missing names are skipped.
_COLLECTIVES = (
    "allgather",
    "all_gather_single",
    "_allgather_base",
    "allgather_coalesced",
    "all_gather_single_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "all_to_all_single",
    "alltoall_base",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "_reduce_scatter_base",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
)
_POINT_TO_POINT = ("send", "recv", "recv_anysource", "barrier")


class HostGroup(dist.ProcessGroup):
    """A process group that passes CPU tensors, and CPU views of device tensors, to gloo."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._store = store
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._host = dist.ProcessGroup(store, rank, size)
        for group, device_type in ((self._host, "cpu"), (self, "cpu"), (self, NAME)):
            group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
            group._register_backend(torch.device(device_type), dist.ProcessGroup.BackendType.GLOO, self._gloo)

    def getBackendName(self) -> str:
        return BACKEND

    def get_group_store(self) -> Any:
        return self._store

    def shutdown(self) -> None:
        self._gloo.shutdown()


distributed: Any = torch._C._distributed_c10d


def _collective(name: str) -> Callable[..., dist.Work]:
    def method(self: HostGroup, *args: Any, **kwargs: Any) -> dist.Work:
        getattr(self._host, name)(*_hosted(args), **_hosted(kwargs)).wait()
        # The result of the work must be the tensors passed in; the output is the first argument.
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(args[0])
        work: dist.Work = distributed._create_work_from_future(future)
        return work

    return method


def _point_to_point(name: str) -> Callable[..., dist.Work]:
    def method(self: HostGroup, *args: Any, **kwargs: Any) -> dist.Work:
        # Do not wait: the other rank may be about to send, too.
        work: dist.Work = getattr(self._host, name)(*_hosted(args), **_hosted(kwargs))
        return work

    return method


def _hosted(given: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, host, given)


for _name in _COLLECTIVES:
    if hasattr(dist.ProcessGroup, _name):
        setattr(HostGroup, _name, _collective(_name))
for _name in _POINT_TO_POINT:
    setattr(HostGroup, _name, _point_to_point(_name))


def register() -> None:
    """Register the backend, as the default of tensors on the device."""
    dist.Backend.register_backend(BACKEND, HostGroup, devices=["cpu", NAME])
