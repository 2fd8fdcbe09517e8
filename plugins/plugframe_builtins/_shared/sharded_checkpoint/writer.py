"""Write a sharded checkpoint: a data file per rank, then rank 0's manifest, which commits them."""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from plugframe.checkpoint import (
    StoredTensor,
    check_space,
    digest,
    draft_name,
    exchange,
    make_folders,
    open_locked,
    remove_if_dead,
    remove_leftovers,
    replacing,
    sync_folder,
)
from plugframe.errors import CheckpointError
from plugframe_builtins._shared.checkpoint_files import formats, sharded_format, tensor_file
from plugframe_builtins._shared.checkpoint_files.index import Chunk, Head, TensorLayout


class Written(NamedTuple):
    """Where a chunk was written; `archive` is the byte range of its archive in torch's layout."""

    file: str
    start: int
    xxh3: tuple[str, ...]
    archive: tuple[int, int] = (0, 0)


#: Shape and dtype of tensors by name.
Shapes = Mapping[str, tuple[torch.Size, torch.dtype]]

#: Approximate bytes per tensor in the header and manifest.
_ENTRY_BYTES = 512


def begin(path: str, shown: str) -> tuple[str, str]:
    """Check that `path` may become a checkpoint, remove files of dead writers, and return an id for the save.

    Returns:
        The id, and the folder to write in: `path`, or a sibling if `path` is a single-file checkpoint, which
        the folder replaces.

    Raises:
        CheckpointError: naming the obstacle.
    """
    with _checkpoint_errors(f"cannot write {shown}"):
        remove_leftovers(os.path.realpath(path))
        if os.path.lexists(path) and not os.path.isdir(path):
            formats.check_file(path, shown)
            return secrets.token_hex(8), draft_name(path)
        if os.path.isdir(path):
            sharded_format.check_content(path, shown)
            keep = committed(path)
            if keep is not None or not os.path.exists(os.path.join(path, sharded_format.MANIFEST)):
                _sweep(path, keep or {})
    return secrets.token_hex(8), path


def committed(path: str) -> Mapping[str, Head] | None:
    """Return the files of the committed checkpoint; None if there is none, or it is unreadable."""
    try:
        return sharded_format.find(path).files
    except (CheckpointError, OSError):
        return None


def _sweep(path: str, keep: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> None:
    """Remove data files that are not kept: those `known` to be obsolete, and those of dead writers."""
    for name in os.listdir(path):
        if not sharded_format.is_data(name) or name in keep:
            continue
        if name in (known or {}):
            with suppress(OSError):
                os.unlink(os.path.join(path, name))
        else:
            remove_if_dead(os.path.join(path, name))


@contextmanager
def _checkpoint_errors(what: str) -> Iterator[None]:
    """Turn every error into a picklable `CheckpointError` that names the attempted action."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{what}: {error.strerror or error}; what was there before is untouched.") from error
    except Exception as error:
        text = " ".join((str(error) or "no message").split())
        raise CheckpointError(
            f"{what}: {type(error).__name__}: {text.rstrip('.')}; what was there before is untouched."
        ) from error


@dataclass(eq=False)
class FolderWriter(StorageWriter):
    """Write one save.

    Attributes:
        path: the folder to write in.
        target: the checkpoint's path; differs from `path` if the folder will replace a file.
        shown: the path in the user's words.
        save_id: unique to this save; see `begin`.
        rank: this rank.
        structure: of the state; rank 0's is written.
        info: about the run; rank 0's is written.
        shapes: of all tensors in `structure`.
    """

    path: str
    target: str
    shown: str
    save_id: str
    rank: int
    structure: Any
    info: Mapping[str, Any]
    shapes: Shapes = field(default_factory=dict)
    _file: BinaryIO | None = None
    _made: list[str] = field(default_factory=list)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer serves a single save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: rank 0 coordinates."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Check the free space for all files, and create the folder. Called on rank 0."""
        with _checkpoint_errors(f"cannot write {self.shown}"):
            size_bytes = sum(_size_bytes(item) + _ENTRY_BYTES for plan in plans for item in plan.items)
            check_space(self.shown, self.path, size_bytes)
            self._made = make_folders(self.path)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file and sync it to disk; its lock is held until `settle`."""
        with _checkpoint_errors(f"cannot write {self.shown} (rank {self.rank})"):
            results = self._write(plan, planner) if self._has_file(plan) else []
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _has_file(self, plan: SavePlan) -> bool:
        return bool(plan.items)

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        # Descending item sizes keep every tensor aligned without padding, which the format forbids.
        items = sorted(plan.items, key=lambda item: -_itemsize(item))
        named = _named(items)
        slots = tensor_file.place({label: _chunk(item) for label, item in named.items()})
        header = tensor_file.build_plain_header(slots, where=self.shown)
        file, name = self._open("safetensors")
        file.write(header)
        checksums = tensor_file.write_tensors(file, {label: values_of(planner, item) for label, item in named.items()})
        self._sync(file)
        end = max(slot.end for slot in slots.values())
        head = Head(size_bytes=len(header) + end, head_bytes=len(header), xxh3=digest(header))
        return [
            WriteResult(MetadataIndex(name), head.size_bytes, head),
            *(
                WriteResult(
                    item.index,
                    slots[label].size_bytes,
                    Written(name, len(header) + slots[label].start, checksums[label]),
                )
                for label, item in named.items()
            ),
        ]

    def _open(self, suffix: str) -> tuple[BinaryIO, str]:
        """Create this rank's file, locked; return it and its name."""
        name = sharded_format.data_name(self.save_id, self.rank, suffix)
        while self._file is None:
            self._file = open_locked(os.path.join(self.path, name))
        return self._file, name

    def _sync(self, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
        sync_folder(self.path)

    @contextmanager
    def _beside(self, tensors: Mapping[str, TensorLayout], results: Sequence[WriteResult]) -> Iterator[None]:
        """Enclose the commit of the manifest on rank 0; a subclass writes what else belongs to the checkpoint."""
        yield
        # Of an older save in torch's layout, whose files are about to be removed.
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.path, sharded_format.TORCH_METADATA))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Replace the manifest once all ranks have written, then remove the old files.

        Called on rank 0.
        """
        with _checkpoint_errors(f"cannot write {self.shown}"):
            flat = [result for each in results for result in each]
            files = {result.index.fqn: result.storage_data for result in flat if isinstance(result.storage_data, Head)}
            tensors = _tensors(metadata, [result for result in flat if result.index.offset is not None])
            data = sharded_format.pack(structure=self.structure, info=self.info, files=files, tensors=tensors)
            before = committed(self.path)
            for above in self._made:
                sync_folder(above)
            manifest = os.path.join(self.path, sharded_format.MANIFEST)
            with self._beside(tensors, flat), replacing(manifest, size_bytes=len(data)) as file:
                file.write(data)
            if self.path != self.target:
                exchange(self.path, self.target)
                sync_folder(os.path.dirname(self.target))
                with suppress(OSError):
                    os.unlink(self.path)  # where the old file is now
                return
        # The checkpoint is committed; files that cannot be removed now are removed by the next save.
        with suppress(OSError):
            _sweep(self.path, files, before)

    def settle(self, *, failed: bool) -> None:
        """Release the file. If the save `failed` on all ranks, rank 0 removes its files."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        self._file = None
        if not failed or self.rank != 0 or not os.path.isdir(self.path):
            return
        with suppress(OSError):
            kept = committed(self.path) or {}
            for name in os.listdir(self.path):
                # The last step may have failed after the manifest was in place.
                if name.startswith(f"{self.save_id}-") and name not in kept:
                    os.unlink(os.path.join(self.path, name))
            if self.path != self.target:
                shutil.rmtree(self.path)
            elif self._made:
                os.rmdir(self.path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return False: a writer cannot be made from a path."""
        return False


def values_of(planner: SavePlanner, item: WriteItem) -> Tensor | StoredTensor:
    """Return the values of an item; only items without tensor data are byte streams."""
    return cast("Tensor | StoredTensor", planner.resolve_data(item))


def _chunk(item: WriteItem) -> tuple[torch.dtype, tuple[int, ...]]:
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype, tuple(item.tensor_data.chunk.sizes)


def _itemsize(item: WriteItem) -> int:
    return _chunk(item)[0].itemsize


def _size_bytes(item: WriteItem) -> int:
    dtype, sizes = _chunk(item)
    return math.prod(sizes) * dtype.itemsize


def _named(items: list[WriteItem]) -> dict[str, WriteItem]:
    """Map the names in the file to items: the tensor's name, plus its box if it is a shard."""
    named: dict[str, WriteItem] = {}
    for item in items:
        assert item.tensor_data is not None
        label = item.index.fqn
        chunk = item.tensor_data.chunk
        if chunk.sizes != item.tensor_data.size:
            box = zip(chunk.offsets, chunk.sizes, strict=True)
            label += f"[{','.join(f'{offset}:{offset + size}' for offset, size in box)}]"
        while label in named or label == "__metadata__":
            label += "#"
        named[label] = item
    return named


def _tensors(metadata: Metadata, results: list[WriteResult]) -> dict[str, TensorLayout]:
    placed: dict[str, dict[torch.Size, Any]] = {}
    for result in results:
        assert result.index.offset is not None  # it is None for what is no tensor
        placed.setdefault(result.index.fqn, {})[result.index.offset] = result.storage_data
    tensors: dict[str, TensorLayout] = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        chunks = []
        for chunk in sorted(entry.chunks, key=lambda chunk: chunk.offsets):
            at: Written = placed[name][chunk.offsets]
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            chunks.append(Chunk(offsets=offsets, sizes=sizes, file=at.file, start=at.start, xxh3=at.xxh3))
        tensors[name] = TensorLayout(dtype=entry.properties.dtype, shape=tuple(entry.size), chunks=tuple(chunks))
    return tensors
