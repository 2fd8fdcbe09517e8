"""The contract: the `Plugin` descriptor and one Protocol of hookspecs per kind.

Nothing here imports torch, so a descriptor's module stays light.
"""

from plugframe.hooks.accelerator import AcceleratorSpec
from plugframe.hooks.checkpoint import CheckpointSpec, SaveHandle
from plugframe.hooks.collective import CollectiveSpec, ReduceOp
from plugframe.hooks.descriptor import API, Plugin
from plugframe.hooks.environment import EnvironmentSpec
from plugframe.hooks.kinds import KINDS, Kind
from plugframe.hooks.launcher import Job, LauncherSpec
from plugframe.hooks.logger import LoggerSpec
from plugframe.hooks.markers import PROJECT, hookimpl, hookspec
from plugframe.hooks.notify import NotifySpec
from plugframe.hooks.precision import Dtypes, PrecisionSpec
from plugframe.hooks.strategy import Engine, StrategySpec

__all__ = [
    "API",
    "KINDS",
    "PROJECT",
    "AcceleratorSpec",
    "CheckpointSpec",
    "CollectiveSpec",
    "Dtypes",
    "Engine",
    "EnvironmentSpec",
    "Job",
    "Kind",
    "LauncherSpec",
    "LoggerSpec",
    "NotifySpec",
    "Plugin",
    "PrecisionSpec",
    "ReduceOp",
    "SaveHandle",
    "StrategySpec",
    "hookimpl",
    "hookspec",
]
