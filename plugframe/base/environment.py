"""The base class of environments with a TCP store on node 0 as rendezvous."""

from __future__ import annotations

import errno
import os
import socket
from datetime import timedelta
from typing import Any

from plugframe.errors import EnvironmentMismatchError
from plugframe.hooks import EnvironmentSpec, hookimpl
from plugframe.hooks.context import Context
from plugframe.hooks.variables import MEETING
from plugframe.hooks.world import World
from plugframe.utils.stores import fresh_store


class Environment(EnvironmentSpec):
    """Base class of environments: implement `environment_world` and `main`, marked with ``@hookimpl``.

    Attributes:
        name: for messages.
        processes_hint: the option for another number of processes per node, with ``{n}`` for the number.
        nodes_hint: the option for another number of nodes, with ``{n}`` for the number.
        packed_hint: the option for ranks numbered node after node.
    """

    name: str = "this environment"
    processes_hint: str = ""
    nodes_hint: str = ""
    packed_hint: str = ""

    def main(self) -> tuple[str, int]:
        """Return host and port of node 0. Not a hook: `environment_store` calls it."""
        raise NotImplementedError

    def read_int(self, variable: str) -> int:
        """Return an environment variable as an integer.

        Raises:
            EnvironmentMismatchError: if it is not set or not an integer.
        """
        text = os.environ.get(variable)
        if text is None:
            raise EnvironmentMismatchError(
                f"{self.name} was detected, but {variable} is not set. Start the script with it, or choose "
                "another environment (environment='local' for a single process)."
            )
        try:
            return int(text)
        except ValueError:
            raise EnvironmentMismatchError(f"{variable}={text!r} is not an integer ({self.name}).") from None

    def main_port(self, job: int) -> int:
        """Return ``MASTER_PORT``, or a port from 20000 to 29999 that all ranks derive from their job's number."""
        return self.read_int("MASTER_PORT") if os.environ.get("MASTER_PORT") else 20_000 + job % 10_000

    def packed_world(self, *, rank: str, size: str, local_rank: str, local_size: str) -> World:
        """Return the world from four variables, given by name; ranks must be numbered node after node.

        Raises:
            EnvironmentMismatchError: if one is missing, or they contradict each other.
        """
        global_rank, local, per_node = (
            self.read_int(rank),
            self.read_int(local_rank),
            self.read_int(local_size),
        )
        world_size = self.read_int(size)
        world = World(
            global_rank=global_rank,
            local_rank=local,
            node_rank=global_rank // max(per_node, 1),
            world_size=world_size,
            local_world_size=per_node,
            num_nodes=max(world_size // max(per_node, 1), 1),
        )
        names = {
            "global_rank": rank,
            "local_rank": local_rank,
            "world_size": size,
            "local_world_size": local_size,
        }
        self.checked(world, names)
        if local != global_rank % per_node:
            typed = f": {self.packed_hint}" if self.packed_hint else ""
            raise EnvironmentMismatchError(
                f"{rank}={global_rank} and {local_rank}={local} do not fit {local_size}={per_node} "
                f"({self.name}): ranks must be numbered node after node{typed}."
            )
        return world

    def checked(self, world: World, names: dict[str, str]) -> World:
        """Validate `world` and return it.

        Args:
            names: for each field of `World`, the variable it was read from; missing fields appear in messages under
                their own names.

        Raises:
            EnvironmentMismatchError: naming the variables that contradict each other, and their values.
        """

        def shown(field: str) -> str:
            return f"{names.get(field, field)}={getattr(world, field)}"

        way_out = f"({self.name}): unset what was set by hand, or set environment='local' for a single process."
        if world.local_world_size * world.num_nodes != world.world_size:
            raise EnvironmentMismatchError(
                f"{shown('local_world_size')} times {shown('num_nodes')} is not {shown('world_size')}, and every "
                f"node must run as many processes as the others {way_out}"
            )
        for rank, size in (
            ("global_rank", "world_size"),
            ("local_rank", "local_world_size"),
            ("node_rank", "num_nodes"),
        ):
            if not 0 <= getattr(world, rank) < getattr(world, size):
                raise EnvironmentMismatchError(f"{shown(rank)} is not at least 0 and below {shown(size)} {way_out}")
        return world

    @hookimpl
    def environment_launched(self) -> bool:
        return True

    @hookimpl
    def environment_requeue(self) -> bool:
        return False

    @hookimpl
    def environment_validate(self, num_processes: int | None, num_nodes: int | None) -> None:
        world = self.environment_world()
        asked = (
            ("processes on each node", num_processes, world.local_world_size, self.processes_hint, "devices"),
            ("nodes", num_nodes, world.num_nodes, self.nodes_hint, "num_nodes"),
        )
        for what, want, have, hint, setting in asked:
            if want is not None and want != have:
                typed = f"type {hint.format(n=want)!r} or " if hint else ""
                raise EnvironmentMismatchError(
                    f"{want} {what} were asked for, {self.name} started {have}: {typed}set {setting}={have}."
                )

    @hookimpl
    def environment_store(self, context: Context, timeout_s: float) -> Any:
        from torch.distributed import HashStore  # type: ignore[attr-defined]

        world = context.world
        if world.world_size == 1:
            return HashStore()  # a single rank needs no socket
        host, port = self.main()
        return fresh(_meet(host, port, world, timeout_s=timeout_s), world)


def _meet(host: str, port: int, world: World, *, timeout_s: float) -> Any:
    """Return the TCP store that rank 0 serves, once every rank has connected."""
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    if not 0 < port < 65_536:
        raise EnvironmentMismatchError(f"MASTER_PORT={port} is not a port: set it to one from 1 to 65535.")
    serves, listener = world.global_rank == 0, None
    if world.num_nodes == 1:
        host = "127.0.0.1"
        listener = _listen(host, port) if serves else None
    timeout = timedelta(seconds=timeout_s)
    try:
        # Multi-tenant, so that a process that connects twice reuses its own running server.
        return TCPStore(
            host,
            port,
            world.world_size,
            serves,
            timeout=timeout,
            multi_tenant=True,
            master_listen_fd=listener,
        )
    except DistError as error:
        did = "serve the others at" if serves else "reach rank 0 at"
        raise EnvironmentMismatchError(
            f"Rank {world.global_rank} of {world.world_size} could not {did} {host}:{port} within {timeout_s:g} s "
            f"({str(error).splitlines()[0]}): see that all ranks run, or set MASTER_ADDR to the host of rank 0 and "
            "MASTER_PORT to a free port there."
        ) from error


def _listen(host: str, port: int) -> int | None:
    """Return a socket bound to one address (a TCP store listens on all by default); None if the port is in use."""
    with socket.socket() as listener:
        # Makes the port of a run that has just ended available at once.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return None
        return listener.detach()


def private_store(world: World) -> Any:
    """Return the file store in the launcher's private folder, for the ranks of one node; None if there is none.

    A TCP store is open to every user of the machine; the folder (mode 0700) only to the owner of the job.
    """
    path = os.environ.get(MEETING)
    if path is None or world.world_size == 1 or world.num_nodes > 1:
        return None
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    folder = os.stat(os.path.dirname(path))
    if folder.st_uid != os.getuid():
        raise EnvironmentMismatchError(f"{MEETING}={path} lies in another user's folder: unset it.")
    # Without a number of users: with one, the last user removes the file while others reconnect.
    return fresh(FileStore(path), world)


def fresh(store: Any, world: World) -> Any:
    """Return `store` behind a new prefix for each time this job connects.

    A second process group over the same store would read the addresses of the first.
    """
    return fresh_store(store, "environment", world.global_rank)
