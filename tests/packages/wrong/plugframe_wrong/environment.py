"""Environments that break one rule each; their variables are those of a scheduler that does not exist."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

from plugframe.base import Environment
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe.hooks.world import World


def names_for(cls: type) -> list[str]:
    """Return the variables of a class's own scheduler, so that no two are detected in one job."""
    return [f"WRONG_{cls.__name__.upper()}_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "PORT")]


class Right(Environment):
    """Breaks none."""

    name = "the scheduler"

    @hookimpl
    def environment_detect(self) -> bool:
        return names_for(type(self))[0] in os.environ

    @hookimpl
    def environment_world(self) -> World:
        rank, size, local_rank, local_size, _ = names_for(type(self))
        return self.packed_world(rank=rank, size=size, local_rank=local_rank, local_size=local_size)

    def main(self) -> tuple[str, int]:
        return "127.0.0.1", self.read_int(names_for(type(self))[-1])


class Everywhere(Right):
    """Takes every process for its own."""

    @hookimpl
    def environment_detect(self) -> bool:
        return True


class Swapped(Right):
    """Takes every rank for the first of its node."""

    @hookimpl
    def environment_world(self) -> World:
        return replace(super().environment_world(), local_rank=0)


class Crashes(Right):
    """Reads its variables without a look at them."""

    @hookimpl
    def environment_world(self) -> World:
        rank, size, local_rank, local_size = (int(os.environ[name]) for name in names_for(Crashes)[:4])
        return World(
            global_rank=rank,
            local_rank=local_rank,
            node_rank=rank // local_size,
            world_size=size,
            local_world_size=local_size,
            num_nodes=size // local_size,
        )


class Agrees(Right):
    """Agrees to whatever is asked for."""

    @hookimpl
    def environment_validate(self, num_processes: int | None, num_nodes: int | None) -> None:
        pass


class Stale(Right):
    """Connects to the same store time after time."""

    @hookimpl
    def environment_store(self, context: Context, timeout_s: float) -> Any:
        from torch.distributed import TCPStore

        world = context.world
        host, port = self.main()
        timeout = timedelta(seconds=timeout_s)
        return TCPStore(host, port, world.world_size, world.global_rank == 0, timeout=timeout, multi_tenant=True)


class Requeues(Right):
    """Says that the job will be started again, whether or not there is one."""

    @hookimpl
    def environment_requeue(self) -> bool:
        return True


class Timid(Right):
    """Comes after the bare shell."""


class Sets(Right):
    """Sets a variable of its own."""

    @hookimpl
    def environment_world(self) -> World:
        world = super().environment_world()
        os.environ["WRONG_SEEN"] = "yes"
        return world
