"""Contract suites and test helpers for plugin authors.

::

    from plugframe.testing import StrategyContract

    class TestAcme(StrategyContract):
        spec = "acme"

The fixtures of `plugframe.testing.pytest_plugin` are there once plugframe is installed. ``pip install
'plugframe[testing]'`` brings pytest. Importing this package imports neither torch nor pytest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plugframe.testing.contracts.accelerator import AcceleratorContract
    from plugframe.testing.contracts.checkpoint import CheckpointContract
    from plugframe.testing.contracts.collective import CollectiveContract
    from plugframe.testing.contracts.environment import EnvironmentContract
    from plugframe.testing.contracts.extension import ExtensionContract
    from plugframe.testing.contracts.launcher import LauncherContract
    from plugframe.testing.contracts.logger import LoggerContract
    from plugframe.testing.contracts.precision import PrecisionContract
    from plugframe.testing.contracts.strategy import StrategyContract
    from plugframe.testing.fakes import FakeAccelerator
    from plugframe.testing.isolated import IsolatedRegistry
    from plugframe.testing.ranks import RanksFailed, run_ranks

__all__ = [
    "AcceleratorContract",
    "CheckpointContract",
    "CollectiveContract",
    "EnvironmentContract",
    "ExtensionContract",
    "FakeAccelerator",
    "IsolatedRegistry",
    "LauncherContract",
    "LoggerContract",
    "PrecisionContract",
    "RanksFailed",
    "StrategyContract",
    "run_ranks",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.endswith("Contract"):
        module = f"contracts.{name.removesuffix('Contract').lower()}"
    else:
        module = {"IsolatedRegistry": "isolated"}.get(name) or ("fakes" if name.startswith("Fake") else "ranks")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
