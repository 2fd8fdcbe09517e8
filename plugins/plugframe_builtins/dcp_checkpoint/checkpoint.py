"""The plugin: every rank writes its part, at once or in the background, and reads what it needs."""

from __future__ import annotations

from plugframe_builtins._shared.sharded_checkpoint.checkpoint import ShardedCheckpoint

__all__ = ["ShardedCheckpoint"]
