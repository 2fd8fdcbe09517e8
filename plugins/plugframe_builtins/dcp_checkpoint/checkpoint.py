"""The checkpoint plugin ``dcp``."""

from __future__ import annotations

from plugframe_builtins._shared.sharded_checkpoint.checkpoint import ShardedCheckpoint

__all__ = ["ShardedCheckpoint"]
