"""Every built-in launcher passes the suite that third parties subclass (law 3)."""

from __future__ import annotations

from contract_classes import of_builtins
from plugframe.testing.contracts.launcher import LauncherContract

globals().update(of_builtins("launcher", LauncherContract))
