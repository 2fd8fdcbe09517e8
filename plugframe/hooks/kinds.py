"""The kinds of plugins: the one table everything else reads. To add a kind, write its hooks and add a row here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of plugin.

    Attributes:
        name: the last word of the entry-point group; for most also the `Lite` keyword.
        path: ``"module:Name"`` of the Protocol whose methods are its hooks.
        help: one line for ``plugframe run --help``.
        plural: the `Lite` keyword and the setting of a kind of which any number of plugins can be active at once:
            ``"loggers"``. Options of such plugins are spelled with the plugin's name: ``--logger.csv.folder``.
        setup_order: position in which its plugins are set up; None for a kind without set-up in the ranks.
    """

    name: str
    path: str
    help: str
    plural: str = ""
    setup_order: int | None = None

    @property
    def spec(self) -> type:
        """The Protocol whose methods are its hooks. Imported here, with pluggy, so that a listing does without."""
        module, _, name = self.path.partition(":")
        spec: type = getattr(importlib.import_module(module), name)
        return spec

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


_HOOKS = "plugframe.hooks"
_TABLE = (
    # The accelerator is set up first, so that tensors can exist.
    Kind("accelerator", f"{_HOOKS}.accelerator:AcceleratorSpec", "Kind of device: auto, cpu, cuda, …", setup_order=1),
    Kind("strategy", f"{_HOOKS}.strategy:StrategySpec", "How the ranks work together: auto, ddp, …", setup_order=4),
    Kind("precision", f"{_HOOKS}.precision:PrecisionSpec", "Precision of the arithmetic: 32, bf16, …", setup_order=3),
    Kind("collective", f"{_HOOKS}.collective:CollectiveSpec", "Who carries messages between ranks.", setup_order=2),
    Kind("checkpoint", f"{_HOOKS}.checkpoint:CheckpointSpec", "Format of checkpoints.", setup_order=5),
    Kind(
        "environment", f"{_HOOKS}.environment:EnvironmentSpec", "Who has started the processes; found out by default."
    ),
    Kind("launcher", f"{_HOOKS}.launcher:LauncherSpec", "Who starts the ranks."),
    Kind("logger", f"{_HOOKS}.logger:LoggerSpec", "Loggers; repeatable or a,b.", plural="loggers", setup_order=6),
    Kind("extension", f"{_HOOKS}.notify:NotifySpec", "Extensions; repeatable or a,b.", plural="plugins"),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _TABLE}
#: The kinds that have hooks ``<kind>_setup`` and ``<kind>_teardown``, in the order of set-up. For a kind of many, the
#: bound hook is None where no plugin is in use.
SETUP_ORDER = tuple(
    name for _, name in sorted((kind.setup_order, kind.name) for kind in _TABLE if kind.setup_order is not None)
)
