"""The kinds of plugins: the one table everything else loops over."""

from __future__ import annotations

from dataclasses import dataclass

from plugframe.hooks.accelerator import AcceleratorSpec
from plugframe.hooks.checkpoint import CheckpointSpec
from plugframe.hooks.collective import CollectiveSpec
from plugframe.hooks.environment import EnvironmentSpec
from plugframe.hooks.launcher import LauncherSpec
from plugframe.hooks.logger import LoggerSpec
from plugframe.hooks.notify import NotifySpec
from plugframe.hooks.precision import PrecisionSpec
from plugframe.hooks.strategy import StrategySpec


@dataclass(frozen=True)
class Kind:
    """A kind of plugin.

    Attributes:
        name: the `Lite` keyword, and the last word of the entry-point group.
        spec: the Protocol whose methods are its hooks.
        many: whether any number of plugins of the kind can be active at once.
    """

    name: str
    spec: type
    many: bool = False

    @property
    def group(self) -> str:
        """The entry-point group."""
        return f"plugframe.{self.name}"


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("accelerator", AcceleratorSpec),
        Kind("strategy", StrategySpec),
        Kind("precision", PrecisionSpec),
        Kind("collective", CollectiveSpec),
        Kind("checkpoint", CheckpointSpec),
        Kind("environment", EnvironmentSpec),
        Kind("launcher", LauncherSpec),
        Kind("logger", LoggerSpec, many=True),
        Kind("extension", NotifySpec, many=True),
    )
}
