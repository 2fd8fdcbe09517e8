"""Read ``torch.distributed.checkpoint`` folders, whose metadata is a pickle, without running code of them."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from plugframe.checkpoint import printable_cause
from plugframe.errors import CheckpointCorruptError, CheckpointError
from plugframe_builtins._shared.checkpoint_files.torch_metadata import (
    UnsafeMetadataError,
    check_folder,
    read_metadata,
)

METADATA = ".metadata"


def is_torch_checkpoint(path: str) -> bool:
    """Return whether a folder is a ``torch.distributed.checkpoint``."""
    return os.path.isfile(os.path.join(path, METADATA))


def read(path: str, *, trusted: bool) -> dict[str, Any]:
    """Return the state in the folder; arbitrary code runs only if `trusted`.

    Raises:
        CheckpointError: if the folder holds more than tensors and plain values and is not `trusted`.
        CheckpointCorruptError: if the folder is damaged.
    """
    try:
        return _read(path, trusted=trusted)
    except (UnsafeMetadataError, _UnsafeValueError) as error:
        raise CheckpointError(
            f"{path} was written by torch.distributed.checkpoint, whose metadata is a pickle and can hold code "
            f"({error}); none of it was run: pass trusted=True only if you trust whoever wrote it."
        ) from None
    except (Exception, CheckpointException) as error:  # noqa: BLE001 a file may hold anything
        text = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointCorruptError(
            f"{path} is not a complete torch.distributed.checkpoint: {type(error).__name__}: {text[:300].rstrip('.')}."
        ) from printable_cause(error)


class _UnsafeValueError(Exception):
    """A value that is no tensor holds more than plain values."""


class _PlainPlanner(DefaultLoadPlanner):
    """Load values that are no tensors without running code of them."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load one value; torch's own method unpickles anything."""
        name = read_item.dest_index.fqn
        try:
            self.state_dict[name] = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise _UnsafeValueError(f"in the value {name!r}") from error


def _read(path: str, *, trusted: bool) -> dict[str, Any]:
    reader = FileSystemReader(path)
    metadata = reader.read_metadata() if trusted else read_metadata(os.path.join(path, METADATA))
    if not trusted:
        check_folder(path, metadata)
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in metadata.state_dict_metadata.items()
    }
    planner = (DefaultLoadPlanner if trusted else _PlainPlanner)(
        flatten_state_dict=False, flatten_sharded_tensors=False
    )
    planner.set_up_planner(state, metadata, True)
    reader.set_up_storage_reader(metadata, True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    plan = reader.prepare_global_plan(planner.create_global_plan([plan]))[0]
    reader.read_data(planner.finish_plan(plan), planner).wait()
    nested: dict[str, Any] = {}
    for name, value in planner.state_dict.items():
        _put(nested, (metadata.planner_data or {}).get(name, (name,)), value)
    return {key: _with_lists(value) for key, value in nested.items()}


def _put(nested: dict[Any, Any], keys: Sequence[str | int], value: Any) -> None:
    for key in keys[:-1]:
        nested = nested.setdefault(key, {})
    nested[keys[-1]] = value


def _with_lists(value: Any) -> Any:
    """Turn dicts with the keys 0, 1, … back into lists."""
    if type(value) is not dict:
        return value
    items = {key: _with_lists(item) for key, item in value.items()}
    if items and all(type(key) is int for key in items) and sorted(items) == list(range(len(items))):
        return [items[number] for number in range(len(items))]
    return items
