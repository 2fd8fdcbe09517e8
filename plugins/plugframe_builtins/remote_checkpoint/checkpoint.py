"""The checkpoint plugin ``remote``: every rank writes its shards to a folder at a URL, and reads those it needs."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from plugframe.base import Checkpoint
from plugframe.checkpoint import Contents, Piece, on_all_ranks, write_shards
from plugframe.errors import CheckpointError
from plugframe.hooks import SaveHandle, hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins._shared.checkpoint_files import formats, sharded_format
from plugframe_builtins._shared.checkpoint_files.tensor_file import CODES
from plugframe_builtins._shared.sharded_checkpoint.checkpoint import ShardedCheckpoint
from plugframe_builtins.remote_checkpoint import reading, writing
from plugframe_builtins.remote_checkpoint.storage import RemoteFolder, checkpoint_errors, local_path

_T = TypeVar("_T")
_UNTOUCHED = "; what was there before is untouched"


@dataclass(frozen=True)
class _Target:
    """Where a rank writes.

    Attributes:
        folder: the checkpoint's folder.
        save_id: unique to the save; rank 0's counts.
        made: whether the folder was empty before; on rank 0.
    """

    folder: RemoteFolder
    save_id: str
    made: bool


class RemoteCheckpoint(Checkpoint):
    """Write a folder per checkpoint to any fsspec URL, in the format of sharded checkpoints on disk.

    Folders can be copied between both and loaded there. Paths of the file system, also as ``file:///…``, are
    delegated to the sharded checkpoint, which syncs to disk. Only one job at a time may save to a URL: object stores
    have no locks to distinguish files of a dead job from those of a running one. The later of two saves fails.
    """

    def __init__(self) -> None:
        self._local: ShardedCheckpoint | None = None

    @hookimpl
    def checkpoint_setup(self, context: Context) -> None:
        super().checkpoint_setup(context)

    @hookimpl
    def checkpoint_teardown(self) -> None:
        local, self._local = self._local, None
        if local is not None:
            local.checkpoint_teardown()

    @hookimpl
    def checkpoint_save(
        self, path: str, state: Mapping[str, Any], info: Mapping[str, Any], wait: bool
    ) -> SaveHandle | None:
        local = local_path(path)
        if local is not None:
            return self._sharded().checkpoint_save(path=local, state=state, info=info, wait=True)
        self._save(path, state, info)
        return None

    @hookimpl
    def checkpoint_load(self, path: str, trusted: bool, lazy: bool) -> dict[str, Any]:
        local = local_path(path)
        if local is not None:
            return self._sharded().checkpoint_load(path=local, trusted=trusted, lazy=lazy)
        world = self.context.world

        def read() -> tuple[dict[str, Any], str]:
            with checkpoint_errors(f"cannot read {path}"):
                folder = RemoteFolder(path)
                return reading.read(folder, lazy=lazy, rank=world.global_rank, num_ranks=world.world_size)

        (state, _), identities = self._together(read, summarize=lambda result: result[1])
        if len(set(identities)) > 1:
            raise CheckpointError(
                f"the ranks found different checkpoints at {path}: is it being written, or not shared by all nodes?"
            )
        return state

    @hookimpl
    def checkpoint_list(self, folder: str) -> list[str]:
        local = local_path(folder)
        if local is not None:
            return super().checkpoint_list(local)
        with checkpoint_errors(f"cannot look into {folder}"):
            return list(RemoteFolder(folder).sizes())

    @hookimpl
    def checkpoint_remove(self, path: str) -> None:
        local = local_path(path)
        if local is not None:
            super().checkpoint_remove(local)
            return
        with checkpoint_errors(f"cannot remove {path}"):
            writing.remove(RemoteFolder(path))

    @hookimpl
    def checkpoint_move(self, path: str, target: str) -> None:
        local = local_path(path)
        if local is not None:
            super().checkpoint_move(local, local_path(target) or target)
            return
        with checkpoint_errors(f"cannot move {path}"):
            RemoteFolder(path).move(RemoteFolder(target))

    def inspect(self, path: str) -> Contents:
        local = local_path(path)
        if local is not None:
            return formats.inspect(local)
        with checkpoint_errors(f"cannot read {path}"):
            return reading.inspect(RemoteFolder(path))

    def unfinished(self, path: str) -> bool:
        local = local_path(path)
        if local is not None:
            return formats.unfinished(local)
        with checkpoint_errors(f"cannot look into {path}"):
            names = list(RemoteFolder(path).sizes())
        # Object stores have no empty folders: nothing is there.
        return bool(names) and sharded_format.is_unfinished(names)

    def _save(self, path: str, state: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        rank, num_ranks = self.context.world.global_rank, self.context.world.world_size

        def prepare() -> _Target:
            with checkpoint_errors(f"cannot write {path}", after=_UNTOUCHED):
                folder = RemoteFolder(path)
                return _Target(folder, secrets.token_hex(8), made=not writing.check(folder) if rank == 0 else False)

        target, save_ids = self._together(prepare, summarize=lambda it: it.save_id)
        save_id = save_ids[0]

        def write(pieces: dict[str, Piece]) -> writing.Written:
            with checkpoint_errors(f"cannot write {path} (rank {rank})", after=_UNTOUCHED):
                return writing.write(target.folder, save_id, rank, pieces)

        def commit(structure: Any, written: list[writing.Written]) -> None:
            with checkpoint_errors(f"cannot write {path}", after=_UNTOUCHED):
                writing.commit(target.folder, save_id, written, structure, info)

        try:
            write_shards(self.context, path, state, write=write, commit=commit, dtypes=CODES.keys())
        except BaseException as error:
            # A CheckpointError is raised on all ranks, so nobody is writing any more.
            if rank == 0 and (isinstance(error, CheckpointError) or num_ranks == 1):
                writing.abandon(target.folder, save_id, made=target.made)
            raise

    def _together(self, act: Callable[[], _T], *, summarize: Callable[[_T], Any]) -> tuple[_T, list[Any]]:
        return on_all_ranks(self.context, "cannot use the URL", act, summarize=summarize)

    def _sharded(self) -> ShardedCheckpoint:
        if self._local is None:
            local = ShardedCheckpoint()
            local.checkpoint_setup(self.context)
            self._local = local
        return self._local
