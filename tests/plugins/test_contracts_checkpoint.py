"""Every built-in checkpoint passes the suite that third parties subclass (law 3)."""

from __future__ import annotations

from contract_classes import of_builtins
from plugframe.testing.contracts.checkpoint import CheckpointContract

globals().update(of_builtins("checkpoint", CheckpointContract))
