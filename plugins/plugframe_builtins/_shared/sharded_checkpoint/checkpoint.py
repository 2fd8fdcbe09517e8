"""Sharded checkpoints: every rank writes its shards, optionally in the background, and reads those it needs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from plugframe.base import Checkpoint
from plugframe.checkpoint import Contents, Packed, StoredTensor, first_error, pack_error, split_stored, unpack_error
from plugframe.errors import CheckpointError, CheckpointURLError, SettingError, UnsupportedError
from plugframe.hooks import SaveHandle, hookimpl
from plugframe.hooks.context import Context
from plugframe.utils.logging import warn_caller
from plugframe_builtins._shared.checkpoint_files import formats
from plugframe_builtins._shared.checkpoint_files.tensor_file import CODES
from plugframe_builtins._shared.sharded_checkpoint.partition import Piece, common, digest, portion, table
from plugframe_builtins._shared.sharded_checkpoint.pending import Pending, clean, explain, interrupted
from plugframe_builtins._shared.sharded_checkpoint.planner import PiecePlanner
from plugframe_builtins._shared.sharded_checkpoint.staging import Staged, Staging
from plugframe_builtins._shared.sharded_checkpoint.torch_writer import TorchFolderWriter, check_names
from plugframe_builtins._shared.sharded_checkpoint.writer import FolderWriter, Shapes, begin
from plugframe_builtins._shared.torch_collective.connection import host_backend

#: The writer of each layout.
LAYOUTS: Mapping[str, type[FolderWriter]] = {"plugframe": FolderWriter, "torch": TorchFolderWriter}


class _Contribution(NamedTuple):
    """A rank's contribution to a save."""

    error: Packed
    digest: bytes
    save_id: str
    folder: str


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
        world = self.context.world
        offer, tensors, structure = self._prepare(path, state)
        offers: list[_Contribution] = self._exchange(offer)
        failed = next((each.error for each in offers if each.error is not None), None)
        if failed is not None:
            raise unpack_error(failed)
        shared = set(table(tensors))
        if len({each.digest for each in offers}) > 1:
            # A rank with an empty shard cannot detect a shared tensor: then no rank checks.
            tensors, structure = self._split(path, state, aliases=False)
            shared = common(self._exchange(table(tensors)), where=path)
        pieces = portion(tensors, shared, rank=world.global_rank, num_ranks=world.world_size)
        writer = LAYOUTS[self.layout](
            offers[0].folder,
            os.path.abspath(path),
            path,
            offers[0].save_id,
            world.global_rank,
            structure,
            dict(info),
            _shapes(tensors),
        )
        if wait:
            self._save(pieces, writer)
            return None
        self._pending = self._save_behind(pieces, writer)
        return self._pending

    @hookimpl
    def checkpoint_load(self, path: str, trusted: bool, lazy: bool) -> dict[str, Any]:
        error = self._unreported()
        failed = first_error(self._exchange(pack_error(error)), error, self.context.world.global_rank)
        if failed is not None:
            raise failed
        return formats.load(path, trusted=trusted, lazy=lazy, context=self.context)

    def inspect(self, path: str) -> Contents:
        return formats.inspect(path)

    def unfinished(self, path: str) -> bool:
        return formats.unfinished(path)

    def _unreported(self) -> CheckpointError | None:
        """Wait for the save in the background; return its error, unless it was raised already."""
        pending, self._pending = self._pending, None
        return pending.unreported() if pending is not None else None

    def _exchange(self, obj: Any) -> list[Any]:
        if self.context.world.world_size == 1:
            return [obj]
        everyone: list[Any] = self.context.hooks.collective_all_gather_object(obj=obj, group=None)
        return everyone

    def _prepare(
        self, path: str, state: Mapping[str, Any]
    ) -> tuple[_Contribution, dict[str, Tensor | StoredTensor], Any]:
        """Run everything that can fail on one rank alone, before anything is written."""
        error = self._unreported()
        if error is not None:
            return _Contribution(pack_error(error), b"", "", ""), {}, None
        try:
            if not path or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
                raise CheckpointURLError(f"{path!r} is not a file system path, which a sharded checkpoint needs.")
            tensors, structure = self._split(path, state)
            first = self.context.world.global_rank == 0
            save_id, folder = begin(os.path.abspath(path), path) if first else ("", "")
        except CheckpointError as problem:
            return _Contribution(pack_error(problem), b"", "", ""), {}, None
        except Exception as problem:  # noqa: BLE001 the other ranks wait for the outcome
            text = f"cannot write {path}: {type(problem).__name__}: {problem}"
            return _Contribution(pack_error(CheckpointError(text)), b"", "", ""), {}, None
        return _Contribution(None, digest(table(tensors)), save_id, folder), tensors, structure

    def _split(
        self, path: str, state: Mapping[str, Any], *, aliases: bool = True
    ) -> tuple[dict[str, Tensor | StoredTensor], Any]:
        tensors, structure = split_stored(state, dtypes=CODES.keys(), where=path, sharded=True, aliases=aliases)
        if self.layout == "torch":
            check_names(structure, _shapes(tensors), where=path)
        return tensors, structure

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


def _shapes(tensors: Mapping[str, Tensor | StoredTensor]) -> Shapes:
    return {name: (torch.Size(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


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
