"""A base for checkpoints: nothing to set up, nothing pending."""

from __future__ import annotations

from plugframe.context import Context
from plugframe.hooks import CheckpointSpec, hookimpl


class Checkpoint(CheckpointSpec):
    """Subclass it, give `checkpoint_save` and `checkpoint_load`, and mark them with ``@hookimpl``."""

    context: Context

    @hookimpl
    def checkpoint_setup(self, context: Context) -> None:
        self.context = context

    @hookimpl
    def checkpoint_teardown(self) -> None:
        pass
