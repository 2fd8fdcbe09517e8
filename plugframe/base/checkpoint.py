"""The base class of checkpoints: synchronous, on file system paths, without set-up."""

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
    """Base class of checkpoints: implement `checkpoint_save` and `checkpoint_load`, marked with ``@hookimpl``."""

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
            raise _failed("list", folder, error) from error

    @hookimpl
    def checkpoint_remove(self, path: str) -> None:
        # Rename atomically first, so that a half-removed checkpoint is never read as complete. If this is interrupted,
        # the next save recognises the name as a leftover draft.
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
        """Return the contents of the checkpoint at `path` without reading its tensors, for ``plugframe checkpoint``.

        Optional, and not a hook.

        Raises:
            CheckpointError: if this plugin cannot read it.
        """
        raise UnsupportedError(f"{type(self).__name__} cannot list the contents of {path}: load it instead.")

    def unfinished(self, path: str) -> bool:
        """Return whether `path` holds only the leftovers of an interrupted save.

        ``lite.checkpoints(folder).resume()`` removes such paths only. Decide by the files at `path`, never by an error,
        and return False if another process may be writing them. Optional, and not a hook.
        """
        return False

    def export(self, path: str, tensors: Mapping[str, Tensor | StoredTensor]) -> None:
        """Write tensors at `path` in a format that other tools read. Optional, and not a hook."""
        raise UnsupportedError(f"{type(self).__name__} does not export files for other tools.")


def _failed(what: str, path: str, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot {what} {path}: {error.strerror or error}.")
