"""The table of plugin kinds. To add a kind, write its hooks and add a row here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A kind of plugin.

    Attributes:
        name: the last word of the entry-point group; for most also the `Lite` keyword.
        path: ``"module:Name"``, in `plugframe.hooks`, of the Protocol whose methods are its hooks.
        help: one line for ``plugframe run --help``.
        plural: the `Lite` keyword and the setting of a kind with any number of active plugins: ``"loggers"``. Options
            of such plugins are spelled with the plugin's name: ``--logger.csv.folder``.
        composes: whether several of its plugins can be combined, as in ``"a+b"``.
        setup_order: position in which its plugins are set up; None for a kind without set-up in the ranks.
    """

    name: str
    path: str
    help: str
    plural: str = ""
    composes: bool = False
    setup_order: int | None = None

    @property
    def spec(self) -> type:
        """The Protocol whose methods are its hooks; imported lazily, because a listing does not need pluggy."""
        module, _, name = self.path.partition(":")
        spec: type = getattr(importlib.import_module(f"plugframe.hooks.{module}"), name)
        return spec

    @property
    def hooks(self) -> list[str]:
        """The names of its hooks."""
        return [name for name, value in vars(self.spec).items() if hasattr(value, "plugframe_spec")]

    def provided_by(self, plugin: Any) -> bool:
        """Return whether an object provides hooks of this kind; any object with a hook is an extension."""
        from plugframe.hooks.markers import marks_of

        if self.name == "extension":
            return any(marks_of(plugin, name) is not None for name in dir(type(plugin)))
        # A wrapper has the hook's name too, but belongs to an extension and provides nothing.
        found = (marks_of(plugin, name) for name in self.hooks)
        return any(marks is not None and not (marks["wrapper"] or marks["hookwrapper"]) for marks in found)

    @property
    def many(self) -> bool:
        """Whether any number of plugins of the kind can be active at once."""
        return bool(self.plural)

    @property
    def setting(self) -> str:
        """The setting that selects its plugins: the `Lite` keyword, and the option of ``plugframe run``."""
        return self.plural or self.name

    @property
    def group(self) -> str:
        """The entry-point group."""
        return f"plugframe.{self.name}"


_TABLE = (
    # The accelerator is set up first, so that tensors can exist.
    Kind("accelerator", "accelerator:AcceleratorSpec", help="Kind of device: auto, cpu, cuda, …", setup_order=1),
    Kind(
        "strategy",
        "strategy:StrategySpec",
        help="How the ranks work together: auto, ddp, …; several as a+b.",
        composes=True,
        setup_order=4,
    ),
    Kind("precision", "precision:PrecisionSpec", help="Precision of the arithmetic: 32, bf16, 16, …", setup_order=3),
    Kind("collective", "collective:CollectiveSpec", help="Communication between the ranks.", setup_order=2),
    Kind("checkpoint", "checkpoint:CheckpointSpec", help="Format of checkpoints.", setup_order=5),
    Kind(
        "environment",
        "environment:EnvironmentSpec",
        help="Scheduler or launcher of the processes; auto-detected.",
    ),
    Kind("launcher", "launcher:LauncherSpec", help="How the ranks are started."),
    Kind("logger", "logger:LoggerSpec", help="Loggers; repeatable or a,b.", plural="loggers", setup_order=6),
    Kind("extension", "notify:NotifySpec", help="Extensions; repeatable or a,b.", plural="plugins"),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _TABLE}

#: The kinds with hooks ``<kind>_setup`` and ``<kind>_teardown``, in the order of set-up. For a plural kind, the bound
#: hook is None if no plugin is in use.
SETUP_ORDER = tuple(
    name for _, name in sorted((kind.setup_order, kind.name) for kind in _TABLE if kind.setup_order is not None)
)


def kind_of(plugin: Any) -> str:
    """Return the kind of a plugin object; one that only wraps hooks is an extension."""
    return next((kind.name for kind in KINDS.values() if kind.provided_by(plugin)), "extension")
