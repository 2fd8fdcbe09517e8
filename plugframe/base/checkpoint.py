"""A base for checkpoints: nothing to set up, nothing pending."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from plugframe.context import Context
from plugframe.errors import UnsupportedError
from plugframe.hooks import CheckpointSpec, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from plugframe.checkpoint import Contents, StoredTensor


class Checkpoint(CheckpointSpec):
    """Subclass it, give `checkpoint_save` and `checkpoint_load`, and mark them with ``@hookimpl``."""

    context: Context

    @hookimpl
    def checkpoint_setup(self, context: Context) -> None:
        self.context = context

    @hookimpl
    def checkpoint_teardown(self) -> None:
        pass

    def inspect(self, path: str) -> Contents:
        """Say what lies at `path` without reading its tensors: for ``plugframe checkpoint``, no hook, and optional.

        Raises:
            CheckpointError: if it is nothing this plugin reads.
        """
        raise UnsupportedError(f"{type(self).__name__} cannot say what {path} holds: load it instead.")

    def export(self, path: str, tensors: Mapping[str, Tensor | StoredTensor]) -> None:
        """Write tensors at `path` for tools that know nothing of this project: no hook, and optional, as `inspect`."""
        raise UnsupportedError(f"{type(self).__name__} writes no files for other tools.")
