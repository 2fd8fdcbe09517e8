"""The environment of ranks started by hand."""

from __future__ import annotations

import os
from typing import NoReturn

from plugframe.base import Environment
from plugframe.errors import EnvironmentMismatchError
from plugframe.hooks import hookimpl
from plugframe.hooks.world import World

_NODE_RANKS = ("NODE_RANK", "GROUP_RANK")
#: With any of these, LOCAL_RANK=0 is taken as a rank; alone, a library may have left it behind.
_OTHERS = (*_NODE_RANKS, "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_WAY_OUT = "if this is no rank, unset what was set by hand or set environment='local'"


class Manual(Environment):
    """One process for each rank, each started with its ``LOCAL_RANK``, as Lightning Fabric documents it.

    The number of ranks is ``WORLD_SIZE``, or follows from the requested devices and nodes; ``NODE_RANK`` is 0
    unless set; ``RANK`` replaces both where the ranks of each node are known. ``MASTER_PORT`` must be set for more
    than one rank, ``MASTER_ADDR`` for more than one node.
    """

    name = "a start by hand"

    def __init__(self) -> None:
        self._processes: int | None = None
        self._nodes: int | None = None

    @hookimpl
    def environment_detect(self) -> bool:
        local = os.environ.get("LOCAL_RANK")
        if local is None:
            # Platforms may number nodes this way, for a torchrun on each: one node means a single process.
            return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
        return local not in ("0", "-1") or any(variable in os.environ for variable in _OTHERS)

    @hookimpl
    def environment_validate(self, num_processes: int | None, num_nodes: int | None) -> None:
        """Use the requested processes and nodes where the variables alone do not describe the job."""
        if "WORLD_SIZE" in os.environ and "LOCAL_WORLD_SIZE" in os.environ:
            super().environment_validate(num_processes, num_nodes)
            return
        self._processes = num_processes or self._processes
        self._nodes = num_nodes or self._nodes
        self.environment_world()

    @hookimpl
    def environment_world(self) -> World:
        size, each = self._size()
        if each < 1 or size % each:
            self._refuse(f"WORLD_SIZE={size} processes are not some nodes of {each} each")
        nodes = size // each
        rank, local = self._read("RANK"), self._read("LOCAL_RANK")
        node = next((self._read(variable) for variable in _NODE_RANKS if variable in os.environ), None)
        if local is None:
            local = self.read_int("LOCAL_RANK") if rank is None else rank % each
        if node is None:
            node = rank // each if rank is not None else 0
            if rank is None and nodes > 1:
                self._refuse(f"NODE_RANK is not set, and {size} ranks on {nodes} nodes were asked for")
        for name, value, limit in (("LOCAL_RANK", local, each), ("NODE_RANK", node, nodes)):
            if not 0 <= value < limit:
                self._refuse(f"{name}={value} is not at least 0 and below {limit}")
        world = World(
            global_rank=node * each + local if rank is None else rank,
            local_rank=local,
            node_rank=node,
            world_size=size,
            local_world_size=each,
            num_nodes=nodes,
        )
        if world.global_rank != node * each + local:
            self._refuse(
                f"RANK={rank} is not the rank of LOCAL_RANK={local} on NODE_RANK={node} with {each} on each node"
            )
        if size > 1:
            self._check_rendezvous(size, nodes)
        return world

    def main(self) -> tuple[str, int]:
        return os.environ.get("MASTER_ADDR", "127.0.0.1"), self.read_int("MASTER_PORT")

    def _size(self) -> tuple[int, int]:
        """Return the number of ranks, in total and on each node."""
        size, given = self._read("WORLD_SIZE"), self._read("LOCAL_WORLD_SIZE")
        each = given or self._processes
        if size is None:
            if each is None:
                self._refuse("WORLD_SIZE is not set, and no devices= either, so it is unknown how many ranks there are")
            return each * (self._nodes or 1), each
        if each is None:
            several = any(os.environ.get(variable, "0") != "0" for variable in _NODE_RANKS)
            address = os.environ.get("MASTER_ADDR", "localhost")
            elsewhere = address not in ("localhost", "::1") and not address.startswith("127.")
            if self._nodes is None and size > 1 and (several or elsewhere):
                self._refuse(
                    f"WORLD_SIZE={size}, and neither devices= nor LOCAL_WORLD_SIZE says how many are on this node"
                )
            each = size // (self._nodes or 1)
        elif self._nodes is not None and each * self._nodes != size:
            self._refuse(f"WORLD_SIZE={size}, but {each} devices on each of {self._nodes} nodes were asked for")
        return size, each

    def _check_rendezvous(self, size: int, nodes: int) -> None:
        if not os.environ.get("MASTER_PORT"):
            self._refuse(f"MASTER_PORT is not set, on which {size} ranks are to connect: a free port, the same for all")
        if nodes > 1 and not os.environ.get("MASTER_ADDR"):
            self._refuse(f"MASTER_ADDR is not set, to which {nodes} nodes are to connect: the host of node 0")

    def _read(self, variable: str) -> int | None:
        return self.read_int(variable) if variable in os.environ else None

    def _refuse(self, what: str) -> NoReturn:
        own = (*_OTHERS, "LOCAL_RANK", "MASTER_ADDR")
        found = ", ".join(f"{name}={os.environ[name]}" for name in own if name in os.environ)
        raise EnvironmentMismatchError(f"This process was started by hand ({found}): {what}; {_WAY_OUT}.")
