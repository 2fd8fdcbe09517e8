"""The contract: the `Plugin` descriptor and one Protocol of hookspecs per kind.

Names are imported on first access and nothing here imports torch, so that a descriptor's module stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plugframe.hooks.accelerator import AcceleratorSpec
    from plugframe.hooks.checkpoint import CheckpointSpec, SaveHandle
    from plugframe.hooks.collective import CollectiveSpec, ReduceOp
    from plugframe.hooks.context import Context
    from plugframe.hooks.descriptor import API, Plugin
    from plugframe.hooks.environment import EnvironmentSpec
    from plugframe.hooks.kinds import KINDS, Kind
    from plugframe.hooks.launcher import Job, LauncherSpec
    from plugframe.hooks.logger import Artifact, HyperParameter, LoggerSpec, artifact_kind
    from plugframe.hooks.markers import PROJECT, hookimpl, hookspec
    from plugframe.hooks.mesh import Axis, MeshLayout
    from plugframe.hooks.notify import NotifySpec
    from plugframe.hooks.option import Option
    from plugframe.hooks.precision import Dtypes, PrecisionSpec
    from plugframe.hooks.strategy import Engine, StrategySpec, no_step
    from plugframe.hooks.world import World

__all__ = [
    "API",
    "KINDS",
    "PROJECT",
    "AcceleratorSpec",
    "Artifact",
    "Axis",
    "CheckpointSpec",
    "CollectiveSpec",
    "Context",
    "Dtypes",
    "Engine",
    "EnvironmentSpec",
    "HyperParameter",
    "Job",
    "Kind",
    "LauncherSpec",
    "LoggerSpec",
    "MeshLayout",
    "NotifySpec",
    "Option",
    "Plugin",
    "PrecisionSpec",
    "ReduceOp",
    "SaveHandle",
    "StrategySpec",
    "World",
    "artifact_kind",
    "hookimpl",
    "hookspec",
    "no_step",
]


def __getattr__(name: str) -> Any:
    module = {
        "API": "descriptor",
        "KINDS": "kinds",
        "PROJECT": "markers",
        "AcceleratorSpec": "accelerator",
        "Axis": "mesh",
        "Artifact": "logger",
        "CheckpointSpec": "checkpoint",
        "CollectiveSpec": "collective",
        "Context": "context",
        "Dtypes": "precision",
        "Engine": "strategy",
        "EnvironmentSpec": "environment",
        "HyperParameter": "logger",
        "Job": "launcher",
        "Kind": "kinds",
        "LauncherSpec": "launcher",
        "LoggerSpec": "logger",
        "MeshLayout": "mesh",
        "NotifySpec": "notify",
        "Option": "option",
        "Plugin": "descriptor",
        "PrecisionSpec": "precision",
        "ReduceOp": "collective",
        "SaveHandle": "checkpoint",
        "StrategySpec": "strategy",
        "World": "world",
        "artifact_kind": "logger",
        "hookimpl": "markers",
        "hookspec": "markers",
        "no_step": "strategy",
    }.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
