"""A collective for a rank without real peers."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from plugframe.base import failing, tell
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins._shared.torch_collective.collective import ProcessGroupCollective
from plugframe_builtins._shared.torch_collective.point_to_point import Message
from plugframe_builtins.simulate.group import BACKEND, register
from plugframe_builtins.simulate.traffic import Traffic


class SimulatedCollective(ProcessGroupCollective):
    """``torch.distributed`` over a process group that sends nothing; at tear-down it logs the traffic.

    Everything else works as in the torch collective: call checks, errors, shapes and dtypes.
    """

    def __init__(self) -> None:
        super().__init__(backend=BACKEND)
        self._traffic = Traffic()

    @hookimpl
    def collective_setup(self, context: Context) -> None:
        register(self._traffic)
        super().collective_setup(context)
        world = context.world
        nodes = f"{world.num_nodes} node{'s' if world.num_nodes > 1 else ''} of {world.local_world_size}"
        tell(
            f"simulated: rank 0 of {world.world_size} on {nodes}, alone. Losses and metrics mean nothing: what another "
            "rank would send is taken to be what this one has."
        )

    @hookimpl
    def collective_teardown(self) -> None:
        traffic, self._traffic = self._traffic, Traffic()
        super().collective_teardown()
        if traffic.lines() and not failing():
            tell(f"not sent by this rank: {', '.join(traffic.lines())}")

    def _compare(self, message: Message, peers: dist.ProcessGroup, carry: Tensor | None) -> Tensor | None:
        return None  # there is no other rank: what it would send is zeros

    def _check_sizes(self, rows: Tensor, peers: dist.ProcessGroup) -> None:
        pass  # the others' sizes are taken to be this rank's, and need not fit them

    @hookimpl
    def collective_broadcast_object(self, obj: Any, src: int, group: Any) -> Any:
        self._peers(group, src)
        return obj

    @hookimpl
    def collective_monitored_barrier(self, name: str, timeout_s: float) -> None:
        self._peers(None)
