"""Create the process group, or adopt an existing one."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Imported before there is a process group: default arguments of its functions would hold that group for ever, and
# gloo's threads with it, which abort the process if they outlive the interpreter.
import torch.distributed.nn.functional

from plugframe.errors import CollectiveTimeoutError, EnvironmentMismatchError, SettingError, UnsupportedError, closest
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe.utils.rank_text import ranks_text
from plugframe.utils.stores import fresh_store
from plugframe_builtins._shared.torch_collective.compat import forget_meshes

#: Shortest timeout in seconds for all ranks to start: on a busy machine or file system some
#: import torch a minute after the others, which a short timeout of collectives is not meant for.
START_S = 300.0


@contextmanager
def connected(context: Context, *, backend: str, timeout_s: float) -> Iterator[None]:
    """Create the default process group, and destroy it on exit."""
    _check_backend(backend)
    world = context.world
    store = context.hooks.environment_store(context=context, timeout_s=timeout_s)
    # Ranks may use one store several times, and must not read addresses of an earlier group.
    store = fresh_store(store, "connections", world.global_rank)
    if "simulated" not in context.provides.get("collective", ()):
        wait_for_ranks(store, world, max(timeout_s, START_S))
    outer_hook = sys.excepthook
    dist.init_process_group(
        backend,
        store=store,
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
        forget_meshes()
        if sys.excepthook is torch_hook:  # torch does not restore it
            sys.excepthook = outer_hook


def wait_for_ranks(store: Any, world: World, timeout_s: float) -> None:
    """Wait until every rank is ready to connect.

    Raises:
        CollectiveTimeoutError: naming the missing ranks.
    """
    key = "arrived/{}".format
    store.set(key(world.global_rank), "")
    if store.add("arrived", 1) == world.world_size:
        store.set(key("all"), "")
    try:
        store.wait([key("all")], timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = [rank for rank in range(world.world_size) if not store.check([key(rank)])]
        if not missing:
            raise
        raise CollectiveTimeoutError(
            f"Of {world.world_size} ranks, {ranks_text(missing)} did not connect within {timeout_s:g} s: look for an "
            "error there, or start what is missing."
        ) from error


def check_existing(context: Context) -> None:
    """Raise if the user's process group differs from the job's ranks."""
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
    """On one node, make the backends' sockets listen on loopback only, including those of later groups."""
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
    """Parse ``"gloo"`` or ``"cpu:gloo,cuda:nccl"`` to backends by device type; ``""`` is the default."""
    pairs = [part.strip().rpartition(":") for part in backend.split(",")]
    return {device: name for device, _, name in pairs}


def host_backend() -> str:
    """Return the process group's backend for CPU tensors; ``"gloo"`` if it has none."""
    return backends(dist.get_backend_config()).get("cpu", "gloo")


def _check_backend(backend: str) -> None:
    known = [name for name in dist.Backend.backend_list if name != "undefined"]
    for name in backends(backend).values():
        if name not in known:
            raise SettingError(
                f"backend={backend!r} is not known to torch.distributed: "
                f"use one of {', '.join(map(repr, known))}.{closest(name, known)}"
            )
        if not dist.is_backend_available(name):
            raise UnsupportedError(
                f"backend={backend!r} needs {name!r}, which this build of torch {torch.__version__} does not have."
            )


def _device_id(backend: str, device: torch.device) -> torch.device | None:
    """Return the device to bind the group to, None if torch or the backend does not support it."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or device.type != accelerator.type or device.index is None:
        return None
    by_device = backends(backend)
    name = by_device.get(device.type, by_device.get(""))
    # Third-party backends may not support binding, which only makes the connection early.
    return device if name == dist.Backend.default_device_backend_map.get(device.type) else None
