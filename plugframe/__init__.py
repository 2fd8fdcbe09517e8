"""Scale a raw PyTorch loop by name: any device, any number of processes, every backend a plugin.

Every name is imported when it is first asked for: a plugin's descriptor and the command line stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plugframe.errors import (
        AmbiguousPluginError,
        CheckpointCorruptError,
        CheckpointError,
        CheckpointMismatchError,
        CheckpointUnfinishedError,
        CheckpointURLError,
        CollectiveMismatchError,
        CollectiveTimeoutError,
        EnvironmentMismatchError,
        MissingDependencyError,
        OrderError,
        OutOfSyncError,
        PlugframeError,
        PlugframeWarning,
        PluginContractError,
        PluginError,
        PluginLoadError,
        RankFailedError,
        RankLostError,
        RefusedPluginError,
        SettingError,
        UnknownPluginError,
        UnsupportedError,
        UsageError,
    )
    from plugframe.hooks import Option, Plugin, hookimpl
    from plugframe.lite import Lite
    from plugframe.seed import seed_everything

__version__ = "0.1.0"

__all__ = [
    "AmbiguousPluginError",
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointURLError",
    "CheckpointUnfinishedError",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "EnvironmentMismatchError",
    "Lite",
    "MissingDependencyError",
    "Option",
    "OrderError",
    "OutOfSyncError",
    "PlugframeError",
    "PlugframeWarning",
    "Plugin",
    "PluginContractError",
    "PluginError",
    "PluginLoadError",
    "RankFailedError",
    "RankLostError",
    "RefusedPluginError",
    "SettingError",
    "UnknownPluginError",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "hookimpl",
    "seed_everything",
]


def __getattr__(name: str) -> Any:
    modules = {"Lite": "lite", "Option": "hooks", "Plugin": "hooks", "hookimpl": "hooks", "seed_everything": "seed"}
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{modules.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
