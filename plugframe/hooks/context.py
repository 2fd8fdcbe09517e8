"""The context of a job that plugins are set up with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from plugframe.hooks.world import World

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

#: Seconds after which ranks that wait for others are reported.
REPORT_AFTER_S = 30.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Context:
    """The context passed to every plugin's ``…_setup`` hook, on every rank, once the job's processes exist.

    Attributes:
        world: the ranks, seen from this process.
        device: this rank's device.
        hooks: every hook by name, bound: ``context.hooks.collective_barrier(name="x")`` runs the selected
            collective's implementation, with extensions applied. Arguments are passed by keyword.
        names: the resolved plugin name of each kind: ``{"strategy": "ddp", "precision": "32-true", …}``.
        mesh: the device mesh of the job, with named dimensions: ``context.mesh["tensor"]``. None for one strategy
            without ``mesh=``, which uses all ranks as it sees fit.
        axes: the names of those axes of `mesh` that belong to the strategy which is given this context.
        averaged: the names of the axes over which the strategy that divides the batch averages gradients, outermost
            first: its own ones, and those of other strategies whose ranks each compute a part of every gradient.
        parallelize: for the strategy that divides the batch: ``context.parallelize(module)`` applies the other
            strategies of the job to a module, in place. It calls this on every rank, once the values of all ranks are
            equal, and before it distributes the module. None if there are no others.
        provides: the capabilities of the selected plugin of each kind, as its descriptor lists them.
        timeout_s: seconds after which a collective raises an error, from ``--timeout``; None when not set.
        report_after_s: seconds after which one line reports the ranks that wait and those they wait for, from
            ``--report-after``; 0 for never.
    """

    world: World
    device: torch.device
    hooks: Any
    names: dict[str, str]
    mesh: DeviceMesh | None = None
    axes: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()
    parallelize: Callable[[torch.nn.Module], None] | None = None
    provides: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    timeout_s: float | None = None
    report_after_s: float = REPORT_AFTER_S
