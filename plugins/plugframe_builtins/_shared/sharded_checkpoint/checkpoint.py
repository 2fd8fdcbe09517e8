"""Sharded checkpoints: every rank writes its shards, optionally in the background, and reads those it needs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from plugframe.base import Checkpoint
from plugframe.checkpoint import Contents, Piece, StoredTensor, divide_state, on_all_ranks
from plugframe.errors import CheckpointError, CheckpointURLError, SettingError, UnsupportedError
from plugframe.hooks import SaveHandle, hookimpl
from plugframe.hooks.context import Context
from plugframe.utils.logging import warn_caller
from plugframe_builtins._shared.checkpoint_files import formats
from plugframe_builtins._shared.checkpoint_files.tensor_file import CODES
from plugframe_builtins._shared.sharded_checkpoint.pending import Pending, clean, explain, interrupted
from plugframe_builtins._shared.sharded_checkpoint.planner import PiecePlanner
from plugframe_builtins._shared.sharded_checkpoint.staging import Staged, Staging
from plugframe_builtins._shared.sharded_checkpoint.torch_writer import TorchFolderWriter, check_names
from plugframe_builtins._shared.sharded_checkpoint.writer import FolderWriter, begin
from plugframe_builtins._shared.torch_collective.connection import host_backend

#: The writer of each layout.
LAYOUTS: Mapping[str, type[FolderWriter]] = {"plugframe": FolderWriter, "torch": TorchFolderWriter}


class ShardedCheckpoint(Checkpoint):
    """Write a folder per checkpoint with ``torch.distributed.checkpoint``; it loads on any number of ranks.

    Args:
        layout: ``"plugframe"`` writes safetensors files. ``"torch"`` writes torch's own archives and metadata, so that
            ``torch.distributed.checkpoint`` reads the folder too; it is loaded here without unpickling anything.
    """

    def __init__(self, *, layout: str = "plugframe") -> None:
        if layout not in LAYOUTS:
            raise SettingError(f"layout={layout!r} is not supported: use {' or '.join(map(repr, LAYOUTS))}.")
        self.layout = layout
        self._pending: Pending | None = None
        self._group: dist.ProcessGroup | None = None
        self._staging = Staging()

    @hookimpl
    def checkpoint_setup(self, context: Context) -> None:
        super().checkpoint_setup(context)
        if context.world.world_size > 1 and context.hooks.collective_process_group() is None:
            raise UnsupportedError(
                f"checkpoint={context.names.get('checkpoint', 'dcp')!r} connects its ranks through torch.distributed, "
                f"which collective={context.names.get('collective')!r} does not: use collective='torch'."
            )

    @hookimpl
    def checkpoint_teardown(self) -> None:
        try:
            error = self._unreported()
        finally:
            self._staging.clear()
            if self._group is not None and dist.is_initialized():
                dist.destroy_process_group(self._group)
            self._group = None
        if error is None:
            return
        if sys.exc_info()[0] is None:
            raise error
        # Another exception is propagating, and matters more.
        warn_caller(str(error))

    @hookimpl
    def checkpoint_save(
        self, path: str, state: Mapping[str, Any], info: Mapping[str, Any], wait: bool
    ) -> SaveHandle | None:
        what = f"cannot write {path}"
        _, begun = on_all_ranks(self.context, what, lambda: self._begin(path), summarize=lambda result: result)
        divided = divide_state(self.context, path, state, dtypes=CODES.keys())
        if self.layout == "torch":
            on_all_ranks(self.context, what, lambda: check_names(divided.structure, divided.shapes, where=path))
        save_id, folder = begun[0]
        writer = LAYOUTS[self.layout](
            folder,
            os.path.abspath(path),
            path,
            save_id,
            self.context.world.global_rank,
            divided.structure,
            dict(info),
            divided.shapes,
        )
        pieces = divided.pieces
        if wait:
            self._save(pieces, writer)
            return None
        self._pending = self._save_behind(pieces, writer)
        return self._pending

    @hookimpl
    def checkpoint_load(self, path: str, trusted: bool, lazy: bool) -> dict[str, Any]:
        on_all_ranks(self.context, f"cannot read {path}", self._raise_unreported)
        return formats.load(path, trusted=trusted, lazy=lazy, context=self.context)

    def inspect(self, path: str) -> Contents:
        return formats.inspect(path)

    def unfinished(self, path: str) -> bool:
        return formats.unfinished(path)

    def _unreported(self) -> CheckpointError | None:
        """Wait for the save in the background; return its error, unless it was raised already."""
        pending, self._pending = self._pending, None
        return pending.unreported() if pending is not None else None

    def _raise_unreported(self) -> None:
        error = self._unreported()
        if error is not None:
            raise error

    def _begin(self, path: str) -> tuple[str, str]:
        """Check that `path` can be written, and return rank 0's id for the save and its folder; see `writer.begin`."""
        self._raise_unreported()
        if not path or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
            raise CheckpointURLError(f"{path!r} is not a file system path, which a sharded checkpoint needs.")
        return begin(os.path.abspath(path), path) if self.context.world.global_rank == 0 else ("", "")

    def _save(self, pieces: Mapping[str, Piece], writer: FolderWriter) -> None:
        values = {name: piece.tensor for name, piece in pieces.items()}
        try:
            self._run(values, PiecePlanner(pieces), writer)
        except BaseException as error:
            writer.settle(failed=clean(error))
            if isinstance(error, (Exception, CheckpointException)) and not interrupted(error):
                failure = explain(error, writer)
                raise failure from failure.__cause__
            # torch wraps an interrupt on any rank in its own error.
            if isinstance(error, CheckpointException):
                raise KeyboardInterrupt from error
            raise
        writer.settle(failed=False)

    def _save_behind(self, pieces: Mapping[str, Piece], writer: FolderWriter) -> Pending:
        values: dict[str, Tensor] = {}
        failure: CheckpointError | None = None
        try:
            values = self._staging.copy({name: _loaded(piece.tensor) for name, piece in pieces.items()})
        except (RuntimeError, MemoryError) as error:
            text = " ".join(str(error).split())
            failure = CheckpointError(
                f"cannot save {writer.shown} in the background (rank {writer.rank}): no memory for a copy of what is "
                f"to be saved: {type(error).__name__}: {text}"
            )
        planner = PiecePlanner(pieces, error=failure)
        group = self._peers()
        if group is None:
            return Pending(_in_thread(lambda: _save_alone(values, planner, writer)), writer)
        answer = async_save(values, storage_writer=writer, planner=planner, process_group=group, async_stager=Staged())
        return Pending(answer if isinstance(answer, Future) else answer.upload_completion, writer)

    def _run(self, values: dict[str, Any], planner: PiecePlanner, writer: FolderWriter) -> None:
        group = self._peers()
        if group is None:
            _save_alone(values, planner, writer)
        else:
            save(values, storage_writer=writer, planner=planner, process_group=group)

    def _peers(self) -> dist.ProcessGroup | None:
        """Return a process group used by no other call, None for a single rank."""
        if self.context.world.world_size == 1:
            return None
        if self._group is None:
            # A separate group: a background save must not mix with the loop's collectives.
            group = dist.new_group(backend=host_backend())
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        return self._group


def _loaded(tensor: Tensor | StoredTensor) -> Tensor:
    return tensor.read() if isinstance(tensor, StoredTensor) else tensor


def _save_alone(values: dict[str, Any], planner: PiecePlanner, writer: FolderWriter) -> None:
    """Save as ``torch.distributed.checkpoint.save`` does, which warns without a process group."""
    planner.set_up_planner(values, writer.storage_meta(), True)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    results = writer.write_data(plan, planner).wait()
    writer.finish(metadata, [results])


def _in_thread(save: Callable[[], None]) -> Future[None]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    future = pool.submit(save)
    pool.shutdown(wait=False)
    return future
