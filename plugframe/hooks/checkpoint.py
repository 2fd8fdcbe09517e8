"""The checkpoint contract: write, read and manage checkpoints of a run's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from plugframe.hooks.markers import provider

if TYPE_CHECKING:
    from plugframe.hooks.context import Context


class SaveHandle(Protocol):
    """A save that may still be running."""

    def wait(self) -> None:
        """Return once the checkpoint is complete on disk; raise if the save failed."""
        ...

    def done(self) -> bool:
        """Return whether the save has ended, successfully or not."""
        ...


class CheckpointSpec(Protocol):
    """Hooks of the kind ``checkpoint``.

    A `state` is a tree of dicts with str or int keys, lists, tuples, tensors and plain values (None, bool, int,
    float, str); everything else has been converted, or refused by key, before. A plugin whose descriptor lists
    ``provides=("sharded",)`` gets each rank's own shards, as ``DTensor``; others get full tensors on rank 0 and may
    ignore the other ranks. ``provides=("async",)`` declares that ``wait=False`` has an effect.
    """

    @provider
    def checkpoint_setup(self, context: Context) -> None:
        """Prepare the plugin. Called once on every rank, after every other provider is set up."""
        ...

    @provider
    def checkpoint_teardown(self) -> None:
        """Finish pending saves. Called once on every rank, also after an exception."""
        ...

    @provider
    def checkpoint_save(
        self, path: str, state: Mapping[str, Any], info: Mapping[str, Any], wait: bool
    ) -> SaveHandle | None:
        """Write `state` at `path` atomically: a crash at any time leaves the previous checkpoint intact.

        Called on every rank. Returns or raises consistently on all ranks.

        Args:
            path: where to write.
            state: this rank's state; see `CheckpointSpec`.
            info: plain values for the manifest: ``"plugframe"`` (the version), ``"world_size"``, ``"plugins"``, and
                ``"modules"``, which describes each module of `state` by its key, nested keys joined by dots: its
                ``"class"``, its ``"config"`` (the module's attribute ``config`` as a dict, such as that of a Hugging
                Face model; None if it has none of plain values) and ``"tied"``, the groups of names in its state that
                are one tensor.
            wait: whether to return only once the checkpoint is complete on disk.

        Returns:
            None once the checkpoint is complete on disk; a handle if `wait` is False and the save may still run.

        Raises:
            CheckpointError: naming the path; the previous checkpoint is left untouched.
        """
        ...

    @provider
    def checkpoint_load(self, path: str, trusted: bool, lazy: bool) -> dict[str, Any]:
        """Read and verify the checkpoint at `path` and return its state, tensors on the CPU.

        Called on every rank. No code from the file may run, unless `trusted` and the file is of a foreign format
        (``torch.save``). If `lazy`, tensors may be `StoredTensor`: verified already, and read on demand, so that no
        rank holds more than its shards.

        Raises:
            CheckpointCorruptError: naming the file and the entry that differs from what was written.
            CheckpointError: if there is no checkpoint at `path`.
        """
        ...

    @provider
    def checkpoint_list(self, folder: str) -> list[str]:
        """Return the names of all entries of `folder`, checkpoints or not, in any order; empty if it does not exist.

        Called on rank 0 by ``lite.checkpoints(folder)``.

        Raises:
            CheckpointError: if the folder cannot be read.
        """
        ...

    @provider
    def checkpoint_remove(self, path: str) -> None:
        """Remove the checkpoint at `path`, so that a partly removed one is never read as complete.

        Called on rank 0 by ``lite.checkpoints(folder)``, while no rank reads or writes it.

        Raises:
            CheckpointError: if it cannot be removed.
        """
        ...

    @provider
    def checkpoint_move(self, path: str, target: str) -> None:
        """Rename the checkpoint at `path`, which may be damaged, to `target` in the same folder.

        Called on rank 0 by ``lite.checkpoints(folder)``, to quarantine a damaged checkpoint.

        Raises:
            CheckpointError: if it cannot be moved.
        """
        ...
