"""Every built-in accelerator passes the suite that third parties subclass (law 3)."""

from __future__ import annotations

from contract_classes import of_builtins
from plugframe.testing import AcceleratorContract

globals().update(of_builtins("accelerator", AcceleratorContract))
