"""Scale a raw PyTorch loop by name: any device, any number of processes, every backend a plugin.

Every name is imported when it is first asked for: a plugin's descriptor and the command line stay light.
"""

from __future__ import annotations

import gc
import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plugframe.core.planning.plan import Plan
    from plugframe.data.seed import seed_everything
    from plugframe.errors import (
        AmbiguousPluginError,
        CheckpointCorruptError,
        CheckpointError,
        CheckpointKeyError,
        CheckpointMismatchError,
        CheckpointNotFoundError,
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
        SettingTypeError,
        UnknownPluginError,
        UnsupportedError,
        UsageError,
    )
    from plugframe.fabric import Fabric
    from plugframe.hooks import Axis, Context, Option, Plugin, SaveHandle, World, hookimpl
    from plugframe.lite import Lite
    from plugframe.state.manager import CheckpointManager
    from plugframe.utils.rank_zero import (
        RankZeroFilter,
        rank_zero_debug,
        rank_zero_info,
        rank_zero_only,
        rank_zero_warn,
    )

__version__ = "0.2.0"

__all__ = [
    "AmbiguousPluginError",
    "Axis",
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointKeyError",
    "CheckpointManager",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointURLError",
    "CheckpointUnfinishedError",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "Context",
    "EnvironmentMismatchError",
    "Fabric",
    "Lite",
    "MissingDependencyError",
    "Option",
    "OrderError",
    "OutOfSyncError",
    "Plan",
    "PlugframeError",
    "PlugframeWarning",
    "Plugin",
    "PluginContractError",
    "PluginError",
    "PluginLoadError",
    "RankFailedError",
    "RankLostError",
    "RankZeroFilter",
    "RefusedPluginError",
    "SaveHandle",
    "SettingError",
    "SettingTypeError",
    "UnknownPluginError",
    "UnsupportedError",
    "UsageError",
    "World",
    "__version__",
    "hookimpl",
    "rank_zero_debug",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "seed_everything",
]

#: Where a name comes from, if not from `plugframe.errors`.
_MODULES = {
    "Axis": "hooks",
    "CheckpointManager": "state.manager",
    "Context": "hooks",
    "Fabric": "fabric",
    "Lite": "lite",
    "Option": "hooks",
    "Plan": "core.planning.plan",
    "Plugin": "hooks",
    "RankZeroFilter": "utils.rank_zero",
    "SaveHandle": "hooks",
    "World": "hooks",
    "hookimpl": "hooks",
    "rank_zero_debug": "utils.rank_zero",
    "rank_zero_info": "utils.rank_zero",
    "rank_zero_only": "utils.rank_zero",
    "rank_zero_warn": "utils.rank_zero",
    "seed_everything": "data.seed",
}

# Former paths of public names, which plugins of API 1 import.
__path__.append(os.path.join(__path__[0], "_deprecated"))


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # What is imported stays: a full collection on the way, of all of torch, would take a fifth of the time.
    collects = gc.isenabled()
    gc.disable()
    try:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
    finally:
        if collects:
            gc.enable()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
