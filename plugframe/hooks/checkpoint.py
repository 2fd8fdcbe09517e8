"""The contract of a checkpoint: how a run's state is laid down in files and found again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from plugframe.hooks.markers import provider

if TYPE_CHECKING:
    from plugframe.hooks.context import Context


class SaveHandle(Protocol):
    """A save that may still be running."""

    def wait(self) -> None:
        """Return once the checkpoint is whole on disk; raise what went wrong."""
        ...

    def done(self) -> bool:
        """Say whether it has ended, well or badly."""
        ...


class CheckpointSpec(Protocol):
    """Hooks of the kind ``checkpoint``.

    A `state` is a tree of dicts with str or int keys, lists, tuples, tensors and plain values (None, bool, int,
    float, str); everything else was turned into that, or refused by key, before. A descriptor that lists
    ``provides=("sharded",)`` is given each rank's own shards, as ``DTensor``; others get full tensors on rank 0 and
    may ignore the rest. ``provides=("async",)`` says that ``wait=False`` has an effect.
    """

    @provider
    def checkpoint_setup(self, context: Context) -> None:
        """Called once on every rank, after every other provider is set up."""
        ...

    @provider
    def checkpoint_teardown(self) -> None:
        """Finish pending saves. Called once on every rank, also after an exception."""
        ...

    @provider
    def checkpoint_save(
        self, path: str, state: Mapping[str, Any], info: Mapping[str, Any], wait: bool
    ) -> SaveHandle | None:
        """Write `state` at `path`, so that a crash at any instant leaves what was there before whole.

        Called on every rank. `info` holds plain values for the manifest: format version, world size, plugins.
        It returns, or raises, alike on all ranks.

        Returns:
            None once the checkpoint is whole on disk; a handle if `wait` is False and it may not be yet.

        Raises:
            CheckpointError: naming the path, with what is there before left untouched.
        """
        ...

    @provider
    def checkpoint_load(self, path: str, trusted: bool, lazy: bool) -> dict[str, Any]:
        """Read and verify what lies at `path` and return its state, tensors on the CPU.

        Called on every rank. No code from the file may run, unless `trusted` and the file is
        a foreign one (``torch.save``). If `lazy`, tensors may be `StoredTensor`: verified already, and read only
        where and when they are needed, so that no rank holds more than its part.

        Raises:
            CheckpointCorruptError: naming the file and the entry that is not what was written.
            CheckpointError: if nothing, or something else, is there.
        """
        ...

    @provider
    def checkpoint_list(self, folder: str) -> list[str]:
        """Return the names of what lies in `folder`, checkpoints or not, in any order; nothing if there is no folder.

        Called on rank 0 by ``lite.checkpoints(folder)``.

        Raises:
            CheckpointError: if the folder cannot be read.
        """
        ...

    @provider
    def checkpoint_remove(self, path: str) -> None:
        """Remove the checkpoint at `path`; at no instant is a part of it taken for a whole one.

        Called on rank 0 by ``lite.checkpoints(folder)``, while no rank reads or writes it.

        Raises:
            CheckpointError: if it cannot be removed.
        """
        ...

    @provider
    def checkpoint_move(self, path: str, target: str) -> None:
        """Move what lies at `path` to `target`, in the same folder; it may be damaged.

        Called on rank 0 by ``lite.checkpoints(folder)``, to set a damaged checkpoint aside.

        Raises:
            CheckpointError: if it cannot be moved.
        """
        ...
