"""The context of a job that plugins are set up with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from plugframe.hooks.descriptor import Plugin
from plugframe.hooks.world import World

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

#: Seconds after which ranks that wait for others are reported.
REPORT_AFTER_S = 30.0


class Inner(NamedTuple):
    """A plugin that another plugin has made, to wrap it.

    Attributes:
        plugin: the object. Its set-up and tear-down are the wrapping plugin's to call.
        descriptor: what it provides and needs, for its options.
    """

    plugin: Any
    descriptor: Plugin


class Make(Protocol):
    """Makes a plugin by name: ``context.make("strategy", "ddp", bucket_cap_mb=5)``."""

    def __call__(self, kind: str, name: str, /, **options: Any) -> Inner:
        """Return a plugin object with its descriptor.

        Raises:
            UnknownPluginError: if none of that name is installed.
            MissingDependencyError: if its dependencies are not.
            SettingError: for an option that it does not have, or a wrong value.
            UnsupportedError: if it does not work on this device or number of ranks.
        """
        ...


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
        base: for a strategy that leads (`strategy_lead`): the object of the strategy that divides the batch, which it
            may set up with this context and use. None for any other strategy.
        make: makes a plugin by name, for one that wraps it; see `Make`.
        provides: the capabilities of the selected plugin of each kind, as its descriptor lists them.
        timeout_s: seconds after which a collective raises an error, from ``--timeout``; None when not set.
        report_after_s: seconds after which one line reports the ranks that wait and those they wait for, from
            ``--report-after``; 0 for never.
        stop_requests: the reasons passed to `request_stop` on this rank.
    """

    world: World
    device: torch.device
    hooks: Any
    names: dict[str, str]
    mesh: DeviceMesh | None = None
    axes: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()
    make: Make | None = None
    parallelize: Callable[[torch.nn.Module], None] | None = None
    base: Any = None
    provides: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    timeout_s: float | None = None
    report_after_s: float = REPORT_AFTER_S
    stop_requests: list[str] = field(default_factory=list)

    def request_stop(self, reason: str) -> None:
        """Request the end of the training loop: ``lite.should_stop`` is True on all ranks from its next read on.

        May be called on one rank, any or all, at any time after set-up, any number of times. It ends nothing by itself:
        the script leaves its loop where it reads ``lite.should_stop``, saves and ends.

        Args:
            reason: why, reported on rank 0 together with the rank.
        """
        self.stop_requests.append(str(reason))
