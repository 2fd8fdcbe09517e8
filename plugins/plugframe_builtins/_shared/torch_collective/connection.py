"""Connecting the ranks: making a process group, or finding the one that is there."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

# Imported before there is a process group: default arguments of its functions would keep that one for ever, and
# the threads of gloo with it, which end the process with an abort if they outlive the interpreter.
import torch.distributed.nn.functional

from plugframe.errors import EnvironmentMismatchError, SettingError, UnsupportedError, closest
from plugframe.hooks.context import Context
from plugframe.utils.stores import fresh_store


@contextmanager
def connected(context: Context, *, backend: str, timeout_s: float) -> Iterator[None]:
    """Make the default process group, and destroy it on leaving."""
    _check_backend(backend)
    world = context.world
    store = context.hooks.environment_store(context=context, timeout_s=timeout_s)
    outer_hook = sys.excepthook
    dist.init_process_group(
        backend,
        # Ranks may meet at one store more than once, and must not read the addresses of the time before.
        store=fresh_store(store, "connections", world.global_rank),
        rank=world.global_rank,
        world_size=world.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=_device_id(backend, context.device),
    )
    torch_hook = sys.excepthook
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if sys.excepthook is torch_hook:  # torch leaves its own behind
            sys.excepthook = outer_hook


def check_existing(context: Context) -> None:
    """Check that the process group the user made is the job plugframe was told about."""
    world = context.world
    found, asked = (dist.get_rank(), dist.get_world_size()), (world.global_rank, world.world_size)
    if found != asked:
        raise EnvironmentMismatchError(
            f"torch.distributed is already initialised as rank {found[0]} of {found[1]}, but this process is "
            f"rank {asked[0]} of {asked[1]}: start the ranks that the process group has, or leave "
            "init_process_group() to plugframe."
        )


@contextmanager
def loopback_only(context: Context) -> Iterator[None]:
    """On one node, let every socket of the backends listen on loopback only, now and in groups made later."""
    name = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    wanted = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name and context.world.num_nodes == 1 else ()
    ours = {variable: name for variable in wanted if variable not in os.environ and name}
    os.environ.update(ours)
    try:
        yield
    finally:
        for variable, value in ours.items():
            if os.environ.get(variable) == value:
                del os.environ[variable]


def backends(backend: str) -> dict[str, str]:
    """Read ``"gloo"`` or ``"cpu:gloo,cuda:nccl"``: backend by device type, that of all others under ``""``."""
    pairs = [part.strip().rpartition(":") for part in backend.split(",")]
    return {device: name for device, _, name in pairs}


def host_backend() -> str:
    """Return the backend of the job's process group for memory on the CPU; ``"gloo"`` where that reaches none."""
    return backends(dist.get_backend_config()).get("cpu", "gloo")


def _check_backend(backend: str) -> None:
    known = [name for name in dist.Backend.backend_list if name != "undefined"]
    for name in backends(backend).values():
        if name not in known:
            raise SettingError(
                f"backend={backend!r} is not known to torch.distributed: "
                f"it knows {', '.join(map(repr, known))}.{closest(name, known)}"
            )
        if not dist.is_backend_available(name):
            raise UnsupportedError(
                f"backend={backend!r} needs {name!r}, which this build of torch {torch.__version__} does not have."
            )


def _device_id(backend: str, device: torch.device) -> torch.device | None:
    """Return the device to bind the group to, None where torch or the backend takes none."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or device.type != accelerator.type or device.index is None:
        return None
    by_device = backends(backend)
    name = by_device.get(device.type, by_device.get(""))
    # One of another make may take none, and a group that is bound early only connects sooner.
    return device if name == dist.Backend.default_device_backend_map.get(device.type) else None
