"""Every built-in extension passes the suite that third parties subclass (law 3)."""

from __future__ import annotations

from contract_classes import of_builtins
from plugframe.testing.contracts.extension import ExtensionContract

globals().update(of_builtins("extension", ExtensionContract))
