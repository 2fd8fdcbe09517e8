"""The plan: the selected plugins and settings, with reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plugframe.core.registry.catalogue import Catalogue
from plugframe.core.registry.entry_points import Entry
from plugframe.hooks.context import REPORT_AFTER_S
from plugframe.hooks.descriptor import Plugin
from plugframe.hooks.mesh import MeshLayout
from plugframe.hooks.world import World


@dataclass(frozen=True)
class OptionValue:
    """An option of a selected plugin, with its source.

    Attributes:
        name: the keyword of its factory.
        value: read and checked.
        key: its name among all: ``strategy.timeout_s``.
        source: where it was given, in words.
    """

    name: str
    value: Any
    key: str
    source: str

    @property
    def text(self) -> str:
        """The value, formatted for display."""
        return self.value if isinstance(self.value, str) else repr(self.value)


@dataclass(frozen=True, eq=False, kw_only=True)
class Choice:
    """One selected plugin.

    Attributes:
        kind: of the plugin.
        name: the name it is selected by, aliases followed.
        reason: why this one, in words.
        descriptor: what it says of itself.
        entry: where it comes from; None for an instance of an unpublished class.
        instance: the object the user passed, or the one made while the plan was; None otherwise.
        options: what was given for it by name.
    """

    kind: str
    name: str
    reason: str
    descriptor: Plugin
    entry: Entry | None = None
    instance: Any = None
    options: tuple[OptionValue, ...] = ()

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments for its factory."""
        return {option.name: option.value for option in self.options}

    @property
    def qualified(self) -> str:
        """Its unique name within the kind: ``plugframe:ddp``."""
        return self.entry.qualified if self.entry else self.name

    @property
    def origin(self) -> str:
        """``ddp (plugframe 0.1.0)``."""
        if self.entry is None:
            return f"{self.name} (an object in the code)"
        return f"{self.name} ({self.entry.distribution} {self.entry.version})"

    def make(self, catalogue: Catalogue) -> Any:
        """Return the plugin object: the instance if there is one, else a new one from the factory."""
        if self.instance is not None:
            return self.instance
        assert self.entry is not None
        return catalogue.make(self.entry, self.arguments)


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """The resolved settings of a job on this machine.

    Attributes:
        choices: the selected plugin of each kind that has one.
        composed: the strategies besides that of `choices`, in the order in which they are applied to a module.
        mesh: the axes of the device mesh; None for one strategy without ``mesh=``.
        extensions: in the order asked for; the first wraps outermost.
        loggers: in the order asked for.
        devices: device index of each local rank.
        devices_reason: why these.
        num_nodes: nodes of the job.
        launched: whether the job's processes exist already.
        world: this process's place, if `launched`.
        timeout_s: of collectives; None where none was asked for.
        report_after_s: seconds after which ranks that wait for another are told; 0 for never.
        diagnostics: whether calls of ranks are recorded, reported when a rank does not come, and compared.
        notes: skipped plugins, with reasons.
    """

    choices: Mapping[str, Choice]
    devices: tuple[int, ...]
    devices_reason: str
    num_nodes: int
    launched: bool
    world: World | None = None
    composed: tuple[Choice, ...] = ()
    mesh: MeshLayout | None = None
    extensions: tuple[Choice, ...] = ()
    loggers: tuple[Choice, ...] = ()
    timeout_s: float | None = None
    report_after_s: float = REPORT_AFTER_S
    diagnostics: bool = True
    notes: tuple[str, ...] = field(default=())

    @property
    def world_size(self) -> int:
        """The number of ranks of the job."""
        return self.world.world_size if self.world else len(self.devices) * self.num_nodes

    @property
    def simulated(self) -> bool:
        """Whether the job is simulated: the other ranks do not exist."""
        return "simulated" in self.choices["environment"].descriptor.provides

    def all_choices(self) -> list[Choice]:
        """Return all plugins in use."""
        return [*self.choices.values(), *self.composed, *self.extensions, *self.loggers]

    def line(self) -> str:
        """Return the plan in one line: every plugin in use with its package and version."""
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        if self.mesh is not None:
            ranks += f" ({self.mesh})"
        return f"{ranks}, " + ", ".join(f"{c.kind} {c.origin}" for c in self.all_choices())
