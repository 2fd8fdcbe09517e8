"""The environment of a simulated job."""

from __future__ import annotations

from typing import Any

from plugframe.base import Environment
from plugframe.errors import SettingError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins.simulate import as_environment


class Simulated(Environment):
    """Rank 0 of a job of `ranks` ranks, on as many nodes as follow from the devices on each.

    Rank 0 does most of the work: it logs, and is the source of most broadcasts.
    """

    name = "simulate"

    def __init__(self, *, ranks: int | None = None) -> None:
        as_environment.validate(self, ranks=ranks)
        self._ranks = ranks
        self._per_node = 1

    @property
    def ranks(self) -> int:
        """Number of ranks of the job."""
        if self._ranks is None:
            raise SettingError("environment='simulate' needs the number of ranks: type --simulate=64, say.")
        return self._ranks

    @hookimpl
    def environment_detect(self) -> bool:
        return False

    @hookimpl
    def environment_validate(self, num_processes: int | None, num_nodes: int | None) -> None:
        """Use the requested shape of the job, once it is consistent with the number of ranks."""
        nodes = num_nodes or (self.ranks // num_processes if num_processes else self.ranks // self._per_node)
        per_node = num_processes or self.ranks // max(nodes, 1)
        if per_node * nodes != self.ranks:
            asked = [f"{num_nodes} nodes" if num_nodes else "", f"{num_processes} on each" if num_processes else ""]
            raise SettingError(
                f"{self.ranks} ranks are to be simulated, which are not {' of '.join(filter(None, asked))}: "
                f"type --simulate={per_node * max(nodes, 1)}, or other --devices and --num-nodes."
            )
        self._per_node = per_node

    @hookimpl
    def environment_world(self) -> World:
        return World(
            world_size=self.ranks,
            local_world_size=self._per_node,
            num_nodes=self.ranks // self._per_node,
        )

    @hookimpl
    def environment_store(self, context: Context, timeout_s: float) -> Any:
        from torch.distributed import HashStore  # type: ignore[attr-defined]

        return HashStore()  # no peers: no socket
