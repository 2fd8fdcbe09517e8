"""A base for environments whose processes meet at a TCP store on node 0."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from plugframe.context import Context
from plugframe.errors import EnvironmentMismatchError
from plugframe.hooks import EnvironmentSpec, hookimpl
from plugframe.world import World


class Environment(EnvironmentSpec):
    """Subclass it, give `environment_world` and `main`, override what differs and mark it with ``@hookimpl``.

    Attributes:
        name: for messages.
        processes_hint: what to type to get another number of processes on a node; ``{n}`` stands for it.
        nodes_hint: what to type to get another number of nodes; ``{n}`` stands for it.
    """

    name: str = "this environment"
    processes_hint: str = ""
    nodes_hint: str = ""

    def main(self) -> tuple[str, int]:
        """Return host and port of node 0. Not a hook: for `environment_store` below."""
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
            raise EnvironmentMismatchError(f"{variable}={text!r} is not a whole number ({self.name}).") from None

    @hookimpl
    def environment_launched(self) -> bool:
        return True

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
        from torch.distributed import HashStore, TCPStore

        world = context.world
        if world.world_size == 1:
            return HashStore()  # nobody to meet: no socket
        host, port = self.main()
        timeout = timedelta(seconds=timeout_s)
        store = TCPStore(host, port, world.world_size, world.global_rank == 0, timeout=timeout)
        return fresh(store, world)


def fresh(store: Any, world: World) -> Any:
    """Return `store` behind a prefix of its own for each time this job connects.

    A second process group over the same store would read the addresses the first one left. The count is kept
    in the store itself, for each rank, so that no process keeps state.
    """
    from torch.distributed import PrefixStore

    generation = store.add(f"plugframe/generation/{world.global_rank}", 1)
    return PrefixStore(f"plugframe/{generation}", store)
