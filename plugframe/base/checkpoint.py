"""A base for checkpoints: nothing to set up, nothing pending, paths of the file system."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING

from plugframe.checkpoint.atomic import draft_name
from plugframe.errors import CheckpointError, CheckpointURLError, UnsupportedError
from plugframe.hooks import CheckpointSpec, hookimpl
from plugframe.hooks.context import Context

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

    @hookimpl
    def checkpoint_list(self, folder: str) -> list[str]:
        if "://" in folder:
            raise CheckpointURLError(f"{folder} is a URL: this checkpoint format keeps to paths of the file system.")
        try:
            return os.listdir(folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _failed("look into", folder, error) from error

    @hookimpl
    def checkpoint_remove(self, path: str) -> None:
        # First out of the way, at once: a half-removed checkpoint must not be taken for a whole one.
        # A name that the next save knows as a leftover, should this end half-way.
        gone = os.path.join(os.path.dirname(path), os.path.basename(draft_name(path)))
        try:
            os.replace(path, gone)
            if os.path.isdir(gone):
                shutil.rmtree(gone)
            else:
                os.unlink(gone)
        except OSError as error:
            raise _failed("remove", path, error) from error

    @hookimpl
    def checkpoint_move(self, path: str, target: str) -> None:
        try:
            os.replace(path, target)
        except OSError as error:
            raise _failed("move", path, error) from error

    def inspect(self, path: str) -> Contents:
        """Say what lies at `path` without reading its tensors: for ``plugframe checkpoint``, no hook, and optional.

        Raises:
            CheckpointError: if it is nothing this plugin reads.
        """
        raise UnsupportedError(f"{type(self).__name__} cannot say what {path} holds: load it instead.")

    def unfinished(self, path: str) -> bool:
        """Say whether `path` holds only what a save left that ended before it made a checkpoint of it.

        ``lite.checkpoints(folder).resume()`` removes such a path, and nothing else. Decide it by what lies there, never
        by an error, and say False of what another process may be writing now. No hook, and optional, as `inspect`.
        """
        return False

    def export(self, path: str, tensors: Mapping[str, Tensor | StoredTensor]) -> None:
        """Write tensors at `path` for tools that know nothing of this project: no hook, and optional, as `inspect`."""
        raise UnsupportedError(f"{type(self).__name__} writes no files for other tools.")


def _failed(what: str, path: str, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot {what} {path}: {error.strerror or error}.")
