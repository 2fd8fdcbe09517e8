"""Write a sharded checkpoint in the layout of torch.distributed.checkpoint, beside plugframe's manifest.

A data file holds one archive of ``torch.save`` per chunk, uncompressed, so that the manifest points at the tensor's
bytes inside it: plugframe reads and verifies the folder as any other, and torch reads the archives by its own metadata.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from plugframe.checkpoint import Checksum, FlattenedTensor, StoredTensor, as_bytes, digest, join, replacing
from plugframe.errors import CheckpointError
from plugframe.utils.tree import map_leaves
from plugframe_builtins._shared.checkpoint_files import sharded_format
from plugframe_builtins._shared.checkpoint_files.index import Gap, Head, TensorLayout
from plugframe_builtins._shared.sharded_checkpoint.writer import FolderWriter, Shapes, Written, values_of

#: Bytes read at a time for checksums.
_READ_BYTES = 1024 * 1024


class _Unread:
    """The source of tensors that are not read: only name, shape and dtype are needed."""

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        raise NotImplementedError


class _Flat(NamedTuple):
    """A state by torch's flat names.

    Attributes:
        values: by flat name, tensors on the meta device.
        paths: the keys of each.
        stored: the tensor in plugframe's manifest, by id of the meta tensor.
    """

    values: dict[str, Any]
    paths: dict[str, Any]
    stored: dict[int, StoredTensor]


@dataclass(eq=False)
class TorchFolderWriter(FolderWriter):
    """Write one save in torch's layout."""

    def _has_file(self, plan: SavePlan) -> bool:
        return self.rank == 0 or super()._has_file(plan)

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        file, name = self._open("distcp")
        flat = _flatten(self.structure, self.shapes)
        dtypes = {stored.name: stored.dtype for stored in flat.stored.values()}
        results: list[WriteResult] = []
        for item in plan.items:
            tensor = _own_storage(values_of(planner, item))
            checksum = Checksum()
            checksum.update(as_bytes(tensor))
            archive = _archive(file, _viewed(tensor, dtypes[item.index.fqn]))
            start = _data_start(file.name, item.index.fqn, archive[0]) if tensor.numel() else archive[0]
            written = Written(name, start, checksum.result(), archive)
            results.append(WriteResult(item.index, tensor.nbytes, written))
        for key, value in flat.values.items() if self.rank == 0 else ():
            if not isinstance(value, Tensor):
                written = Written(name, 0, (), _archive(file, value))
                results.append(WriteResult(MetadataIndex(key), 0, written))
        self._sync(file)
        gaps = _gaps(file.name, [(result.storage_data.start, result.size_in_bytes) for result in results])
        head = Head(size_bytes=file.tell(), head_bytes=0, xxh3=digest(b""), gaps=gaps)
        return [WriteResult(MetadataIndex(name), head.size_bytes, head), *results]

    @contextmanager
    def _beside(self, tensors: Mapping[str, TensorLayout], results: Sequence[WriteResult]) -> Iterator[None]:
        data = pickle.dumps(_metadata(_flatten(self.structure, self.shapes), tensors, results))
        with replacing(os.path.join(self.path, sharded_format.TORCH_METADATA), size_bytes=len(data)) as file:
            file.write(data)
            file.flush()  # a full disk raises before the manifest is replaced
            yield


def check_names(structure: Any, shapes: Shapes, *, where: str) -> None:
    """Raise if the flat names of torch, the keys joined by dots, are not distinct, or if there is a tensor subclass.

    Raises:
        CheckpointError: naming the first.
    """
    try:
        flat = _flatten(structure, shapes)
        wrapped = next((key for key, value in flat.values.items() if isinstance(value, FlattenedTensor)), None)
    except ValueError as error:
        raise CheckpointError(
            f"cannot save {where}, nothing was written: layout='torch' joins the keys of a state by dots, and two "
            f"become equal ({error}): rename one, or use layout='plugframe'."
        ) from error
    if wrapped is not None:
        raise CheckpointError(
            f"cannot save {where}, nothing was written: {wrapped!r} is a {flat.values[wrapped].class_name}, a subclass "
            "of Tensor, which layout='torch' does not hold: use layout='plugframe'."
        )


def _flatten(structure: Any, shapes: Shapes) -> _Flat:
    leaves: dict[int, StoredTensor] = {}

    def on_meta(stored: StoredTensor) -> Tensor:
        tensor = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        leaves[id(tensor)] = stored
        return tensor

    unread = {name: StoredTensor(name, shape, dtype, _Unread()) for name, (shape, dtype) in shapes.items()}
    tree = map_leaves(on_meta, join(unread, structure), StoredTensor)
    values, paths = flatten_state_dict(tree)
    return _Flat(values, dict(paths), leaves)


def _own_storage(values: Tensor | StoredTensor) -> Tensor:
    """Return values as a contiguous CPU tensor without other values in its storage, which torch.save would write."""
    tensor = (values.read() if isinstance(values, StoredTensor) else values).detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _viewed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.view_as_complex(tensor) if dtype.is_complex else tensor.view(dtype)


def _archive(file: BinaryIO, value: Any) -> tuple[int, int]:
    """Append an archive of ``torch.save`` to a file; return its offset and size."""
    start = file.tell()
    torch.save(value, file)
    return start, file.tell() - start


class _FromHere(io.FileIO):
    """A file without what is before position `start`: Python 3.13 refuses an archive that has something before it."""

    def __init__(self, path: str, start: int) -> None:
        super().__init__(path, "rb")
        self._start = start
        self.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET:
            offset += self._start
        return super().seek(offset, whence) - self._start

    def tell(self) -> int:
        return super().tell() - self._start


def _data_start(path: str, name: str, start: int) -> int:
    """Return where the bytes of the only tensor begin in the last archive of a file, which begins at `start`."""
    with _FromHere(path, start) as file, zipfile.ZipFile(file) as archive:
        (entry,) = [each for each in archive.infolist() if each.filename.endswith("/data/0")]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"torch {torch.__version__} compresses {name!r}: layout='torch' cannot be written.")
        # A local header has 30 bytes, then a name and extra fields of the sizes at its end.
        file.seek(entry.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
        return start + entry.header_offset + 30 + int(name_bytes) + int(extra_bytes)


def _gaps(path: str, stretches: Sequence[tuple[int, int]]) -> tuple[Gap, ...]:
    """Return what is between byte ranges (start, size) of a file, with checksums."""
    gaps = []
    with open(path, "rb") as file:
        ends = [(0, 0), *sorted(each for each in stretches if each[1]), (os.fstat(file.fileno()).st_size, 0)]
        for (start, size), (stop, _) in itertools.pairwise(ends):
            if (begin := start + size) < stop:
                file.seek(begin)
                checksum = Checksum()
                for at in range(begin, stop, _READ_BYTES):
                    checksum.update(file.read(min(_READ_BYTES, stop - at)))
                gaps.append(Gap(start=begin, size_bytes=stop - begin, xxh3=checksum.result()))
    return tuple(gaps)


def _metadata(flat: _Flat, tensors: Mapping[str, TensorLayout], results: Sequence[WriteResult]) -> Metadata:
    """Return torch's metadata; several names of one tensor refer to the same archives."""
    placed = {(result.index.fqn, result.index.offset): result.storage_data for result in results}
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    for key, value in flat.values.items():
        if not isinstance(value, Tensor):
            entries[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = _place(placed[key, None])
            continue
        name, dims = flat.stored[id(value)].name, value.dim()
        chunks = []
        for chunk in tensors[name].chunks:
            # A complex tensor has one dimension less than the pairs of numbers in plugframe's manifest.
            offsets, sizes = torch.Size(chunk.offsets[:dims]), torch.Size(chunk.sizes[:dims])
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            storage[MetadataIndex(key, offsets)] = _place(placed[name, torch.Size(chunk.offsets)])
        entries[key] = TensorStorageMetadata(TensorProperties(dtype=value.dtype), value.shape, chunks)
    return Metadata(entries, planner_data=flat.paths, storage_data=storage, storage_meta=StorageMeta())


def _place(written: Written) -> Any:
    # A private class, but the one that every folder of torch.distributed.checkpoint has in its metadata.
    return _StorageInfo(written.file, *written.archive)
