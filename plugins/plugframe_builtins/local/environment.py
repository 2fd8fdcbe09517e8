"""The environment of a process without a launcher."""

from __future__ import annotations

from plugframe.base import Environment
from plugframe.hooks import hookimpl
from plugframe.hooks.world import World
from plugframe_builtins._shared.requeue import requeue


class Local(Environment):
    """A single process: a launcher starts further ranks if requested."""

    name = "this machine"

    @hookimpl
    def environment_detect(self) -> bool:
        return True

    @hookimpl
    def environment_launched(self) -> bool:
        return False

    @hookimpl
    def environment_world(self) -> World:
        return World()

    @hookimpl
    def environment_requeue(self) -> bool:
        return requeue()  # a batch script may have started the launcher

    @hookimpl
    def environment_validate(self, num_processes: int | None, num_nodes: int | None) -> None:
        """Accept any request: any number of processes can still be started."""
