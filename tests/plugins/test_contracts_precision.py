"""Every built-in precision passes the suite that third parties subclass (law 3)."""

from __future__ import annotations

from contract_classes import of_builtins
from plugframe.testing import PrecisionContract

globals().update(of_builtins("precision", PrecisionContract))
