"""Read the metadata of torch.distributed.checkpoint, which is a pickle, without importing or calling anything it names.

Every class that such metadata holds becomes a record made for this one read: it can neither run code nor change a class
of torch. Any other name is refused.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
from collections.abc import Mapping, Sequence
from typing import IO, Any

import torch
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

from plugframe_builtins._shared.checkpoint_files.coverage import fills
from plugframe_builtins._shared.checkpoint_files.regular_file import open_regular

_METADATA = "torch.distributed.checkpoint.metadata"
_ADMITTED = {
    *((_METADATA, cls.__name__) for cls in (BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex)),
    *((_METADATA, cls.__name__) for cls in (StorageMeta, TensorProperties, TensorStorageMetadata)),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


#: Opcodes of what metadata never holds: references to something outside, extensions, and buffers.
_REFUSED = {
    *("BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4"),
    *("PERSID", "BINPERSID", "INST", "OBJ"),
}
#: Opcodes with the number of a memo entry, for which the unpickler reserves a table.
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}


class UnsafeMetadataError(Exception):
    """The metadata names something that metadata of torch never does."""


class _Record:
    """An object of a pickle: its arguments and its state."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._made: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return a record's class, made for this read: a pickle may set attributes of what it is given."""
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if (module, name) not in _ADMITTED:
            raise UnsafeMetadataError(f"{module}.{name}")
        return self._made.setdefault((module, name), type(name, (_Record,), {}))

    def persistent_load(self, pid: Any) -> Any:
        """Raise: metadata refers to nothing outside."""
        raise UnsafeMetadataError("a persistent id")


def read_metadata(path: str) -> Metadata:
    """Return the metadata in a file.

    Raises:
        UnsafeMetadataError: with the name that is none of torch's metadata; nothing was imported or run.
        Exception: of any other kind, if the file is damaged.
    """
    with open_regular(path) as file:
        data = file.read()
    _check_opcodes(data)
    fields = _fields(_Unpickler(io.BytesIO(data)).load(), "Metadata")
    storage = fields["storage_data"]
    return Metadata(
        {_text(name): _entry(entry) for name, entry in fields["state_dict_metadata"].items()},
        planner_data={_text(name): tuple(keys) for name, keys in (fields.get("planner_data") or {}).items()},
        storage_data={_index(index): _storage(info) for index, info in storage.items()},
        storage_meta=StorageMeta(),
    )


def _check_opcodes(data: bytes) -> None:
    """Raise for what metadata of torch never has: opcodes that reach outside, or reserve memory for nothing."""
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name in _REFUSED or (opcode.name in _PUTS and int(argument or 0) > (position or 0)):
            raise UnsafeMetadataError(f"the opcode {opcode.name}")


def check_folder(folder: str, metadata: Metadata) -> None:
    """Raise unless the tensors fit in the folder's files, and their chunks cover each exactly once.

    Raises:
        ValueError: naming what does not.
    """
    names = sorted({info.relative_path for info in (metadata.storage_data or {}).values()})
    size_bytes = 0
    for name in names:
        with open_regular(os.path.join(folder, name)) as file:
            size_bytes += os.fstat(file.fileno()).st_size
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
            inside = all(_is_inside(offsets, sizes, entry.size) for offsets, sizes in boxes)
            if not inside or not fills(entry.size, boxes):
                raise ValueError(f"the chunks of {name!r} do not fill it exactly once")
            size_bytes -= math.prod(entry.size) * entry.properties.dtype.itemsize
    if size_bytes < 0:
        raise ValueError("its tensors are larger than its files")


def _is_inside(offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> bool:
    return len(offsets) == len(sizes) == len(shape) and all(
        at >= 0 and extent >= 0 and at + extent <= size for at, extent, size in zip(offsets, sizes, shape, strict=True)
    )


def _fields(record: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(record, _Record) or type(record).__name__ != name:
        raise ValueError(f"expected {name}, found {type(record).__name__}")
    state = record.state
    if not isinstance(state, dict):
        raise ValueError(f"a {name} has no fields")
    return state


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a name, found {type(value).__name__}")
    return value


def _size(value: Any) -> torch.Size:
    return torch.Size([int(each) for each in value])


def _entry(record: Any) -> Any:
    if type(record).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(record, "TensorStorageMetadata")
    dtype = fields["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no dtype")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        _size(fields["size"]),
        [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, "MetadataIndex")
    offset = fields.get("offset")
    return MetadataIndex(_text(fields["fqn"]), None if offset is None else _size(offset))


def _storage(record: Any) -> Any:
    fields = _fields(record, "_StorageInfo")
    name = _text(fields["relative_path"])
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not a file of the folder")
    transforms = [_text(each) for each in fields.get("transform_descriptors") or ()]
    return _StorageInfo(name, int(fields["offset"]), int(fields["length"]), transforms or None)
