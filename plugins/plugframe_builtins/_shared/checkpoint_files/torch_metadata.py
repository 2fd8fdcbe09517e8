"""Read the metadata of torch.distributed.checkpoint, which is a pickle, without importing or calling anything it names.

Every class that such metadata holds becomes a record made for this one read: it can neither run code nor change a class
of torch. Any other name is refused.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
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
    with open(path, "rb") as file:
        fields = _fields(_Unpickler(file).load(), "Metadata")
    storage = fields["storage_data"]
    return Metadata(
        {_text(name): _entry(entry) for name, entry in fields["state_dict_metadata"].items()},
        planner_data={_text(name): tuple(keys) for name, keys in (fields.get("planner_data") or {}).items()},
        storage_data={_index(index): _storage(info) for index, info in storage.items()},
        storage_meta=StorageMeta(),
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
