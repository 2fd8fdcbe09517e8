"""The environment of torchrun."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from plugframe.base import Environment, private_store
from plugframe.errors import EnvironmentMismatchError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins._shared.requeue import requeue
from plugframe_builtins.torchelastic import plugin
from plugframe_builtins.torchelastic.attempt import only_this_attempt


class TorchElastic(Environment):
    """Ranks of torchrun, or started by hand with the same variables.

    Without ``LOCAL_WORLD_SIZE``, which torchrun always sets, all ranks are assumed to run on one node if
    ``MASTER_ADDR`` is a loopback address or there is one rank; otherwise it must be set.
    """

    name = "torchrun"
    processes_hint = "torchrun --nproc-per-node={n}"
    nodes_hint = "torchrun --nnodes={n}"
    packed_hint = "start torchrun without --virtual-local-rank, or set both by hand accordingly"

    @hookimpl
    def environment_detect(self) -> bool:
        return all(variable in os.environ for variable in plugin.variables)

    @hookimpl
    def environment_world(self) -> World:
        world = self.packed_world(
            rank="RANK", size="WORLD_SIZE", local_rank="LOCAL_RANK", local_size=self._local_size()
        )
        for variable, what, found in (
            ("GROUP_RANK", "node rank", world.node_rank),
            ("GROUP_WORLD_SIZE", "number of nodes", world.num_nodes),
        ):
            if variable in os.environ and self.read_int(variable) != found:
                raise EnvironmentMismatchError(
                    f"{variable}={os.environ[variable]} is not the {what}, {found}, that follows from "
                    f"RANK={world.global_rank}, WORLD_SIZE={world.world_size} and "
                    f"LOCAL_WORLD_SIZE={world.local_world_size}: start as many processes on every node."
                )
        return world

    def _local_size(self) -> str:
        """Return the name of the variable with the number of ranks on this node."""
        if "LOCAL_WORLD_SIZE" in os.environ:
            return "LOCAL_WORLD_SIZE"
        address = os.environ.get("MASTER_ADDR", "")
        loopback = address in ("localhost", "::1") or address.startswith("127.")
        if self.read_int("WORLD_SIZE") != 1 and not loopback:
            raise EnvironmentMismatchError(
                f"LOCAL_WORLD_SIZE is not set, and MASTER_ADDR={address} may be another host, so it is unknown how "
                f"many of the WORLD_SIZE={os.environ['WORLD_SIZE']} processes run on this node: set "
                "LOCAL_WORLD_SIZE, or start the script with torchrun, which does."
            )
        return "WORLD_SIZE"

    def main(self) -> tuple[str, int]:
        return os.environ.get("MASTER_ADDR", ""), self.read_int("MASTER_PORT")

    @hookimpl
    def environment_requeue(self) -> bool:
        return requeue()  # a batch script may have started the launcher

    @hookimpl
    def environment_store(self, context: Context, timeout_s: float) -> Any:
        world = context.world
        private = private_store(world)
        if private is not None:
            return private
        if world.world_size == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
            return super().environment_store(context, timeout_s)
        from torch.distributed import rendezvous  # type: ignore[attr-defined]

        timeout = timedelta(seconds=timeout_s)
        store, _, _ = next(rendezvous("env://", world.global_rank, world.world_size, timeout=timeout))
        return only_this_attempt(store, world, timeout_s=timeout_s)
