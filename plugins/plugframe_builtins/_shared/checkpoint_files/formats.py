"""Open a checkpoint of any supported format: plugframe's own, or another tool's.

Modules built on torch.distributed.checkpoint are slow to import, and are imported where they are used.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from plugframe.checkpoint import (
    Contents,
    first_error,
    is_being_written,
    join,
    pack_error,
    printable_cause,
)
from plugframe.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointURLError,
    closest,
)
from plugframe.hooks.context import Context
from plugframe_builtins._shared.checkpoint_files import foreign, sharded_format, single_file_reader
from plugframe_builtins._shared.checkpoint_files.files import Files
from plugframe_builtins._shared.checkpoint_files.index import Index
from plugframe_builtins._shared.checkpoint_files.reading import read_state
from plugframe_builtins._shared.checkpoint_files.regular_file import open_regular


def load(path: str, *, trusted: bool, lazy: bool, context: Context) -> dict[str, Any]:
    """Read and verify the checkpoint at `path`; see `CheckpointSpec.checkpoint_load`.

    All ranks must call it. Raises on all ranks if it fails on one.
    """
    world = context.world
    state: dict[str, Any] = {}
    identity = ""
    failure: CheckpointError | None = None
    try:
        state, identity = _load(path, trusted, lazy, world.global_rank, world.world_size)
    except Exception as error:  # noqa: BLE001 the other ranks wait for the outcome
        failure = _as_ours(error, path)
    if world.world_size > 1:
        everyone = context.hooks.collective_all_gather_object(obj=(pack_error(failure), identity), group=None)
        failure = first_error([packed for packed, _ in everyone], failure, world.global_rank)
        if failure is None and len({each for _, each in everyone}) > 1:
            failure = CheckpointError(
                f"the ranks found different checkpoints at {path}: is it being written, or not shared by all nodes?"
            )
    if failure is not None:
        raise failure
    return state


def _as_ours(error: Exception, path: str) -> CheckpointError:
    """Return an error of reading `path` as a `CheckpointError`: a file may hold anything, and exceed memory."""
    if isinstance(error, CheckpointError):
        return error
    if isinstance(error, OSError):
        text = error.strerror or str(error)
    else:
        text = f"{type(error).__name__}: {' '.join((str(error) or 'no message').split())[:300].rstrip('.')}"
    failure = CheckpointError(f"cannot read {path}: {text}.")
    failure.__cause__ = printable_cause(error)
    failure.__suppress_context__ = True
    return failure


def _load(path: str, trusted: bool, lazy: bool, rank: int, num_ranks: int) -> tuple[dict[str, Any], str]:
    if os.path.isdir(path):
        if _is_torchs(path):
            from plugframe_builtins._shared.checkpoint_files import torch_format

            return torch_format.read(path, trusted=trusted), ""
        found = sharded_format.find(path)
        files = Files(path, found.files)
        return read_state(found, files, lazy=lazy, rank=rank, num_ranks=num_ranks), found.identity
    _check_present(path)
    with open_regular(path) as file:
        kind = single_file_reader.sniff(file, path)
        if kind == "own" and not lazy:
            return single_file_reader.read(file, path), ""
        if kind == "torch":
            return foreign.read_torch(path, trusted=trusted), ""
        lying = single_file_reader.find(file, path) if kind == "own" else foreign.find(file, path) if lazy else None
        if lying is None:
            return foreign.read_safetensors(path), ""
        files = Files(path, lying.files)
        files.adopt("", file.fileno())
        return read_state(lying, files, lazy=lazy, rank=rank, num_ranks=num_ranks), lying.identity


def check_file(path: str, shown: str) -> None:
    """Raise if a file is not a checkpoint: a sharded checkpoint must not replace it.

    Raises:
        CheckpointError: naming the file.
    """
    try:
        with open_regular(path) as file:
            single_file_reader.sniff(file, path)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(
            f"{shown} is a file that is not a checkpoint, and a sharded checkpoint is a folder: give another name."
        ) from error


def inspect(path: str) -> Contents:
    """Return the contents of the checkpoint at `path`, without reading tensors or running code.

    Raises:
        CheckpointError: if there is no checkpoint, or one that is read only if trusted.
    """
    try:
        return _inspect(path)
    except Exception as error:  # noqa: BLE001 a file may hold anything
        failure = _as_ours(error, path)
        raise failure from failure.__cause__


def unfinished(path: str) -> bool:
    """Return whether `path` is an abandoned save without a manifest, which no process writes any more."""
    try:
        return (
            not os.path.islink(path)
            and sharded_format.is_unfinished(os.listdir(path))
            and not any(is_being_written(os.path.join(path, name)) for name in os.listdir(path))
        )
    except OSError:
        return False  # a file, or an unreadable folder


def _inspect(path: str) -> Contents:
    from plugframe_builtins._shared.checkpoint_files.source import FileSource

    found = _find(path)
    state = join(FileSource(found, Files(path, found.files)).tensors(), found.structure, where=path)
    if not isinstance(state, dict):
        raise CheckpointCorruptError(f"{path}: its structure is a {type(state).__name__}, not a dict.")
    return Contents(
        format=found.format,
        version=found.version,
        size_bytes=found.size_bytes,
        num_files=len(found.files) + (not os.path.isfile(path)),
        verifiable=found.version > 0,
        info=found.info,
        state=state,
    )


def _find(path: str) -> Index:
    if os.path.isdir(path):
        if _is_torchs(path):
            raise CheckpointError(
                f"{path} is a folder of torch.distributed.checkpoint, which is not read lazily: load it, and save "
                "it again."
            )
        return sharded_format.find(path)
    _check_present(path)
    with open_regular(path) as file:
        kind = single_file_reader.sniff(file, path)
        if kind == "torch":
            raise CheckpointError(
                f"{path} is a file of torch.save, which cannot be read lazily: load it, and save it again."
            )
        lying = single_file_reader.find(file, path) if kind == "own" else foreign.find(file, path)
    if lying is None:
        raise CheckpointError(f"{path} is a safetensors file with dtypes that torch {torch.__version__} lacks.")
    return lying


def _is_torchs(path: str) -> bool:
    """Return whether a folder is a torch.distributed.checkpoint; a plugframe manifest takes precedence."""
    from plugframe_builtins._shared.checkpoint_files import torch_format

    return torch_format.is_torch_checkpoint(path) and not sharded_format.opens(path)


def _check_present(path: str) -> None:
    if os.path.isfile(path):
        return
    if os.path.lexists(path):
        raise CheckpointError(f"{path} is not a regular file.")
    if "://" in path:
        raise CheckpointURLError(f"{path} is a URL: this checkpoint format keeps to paths of the file system.")
    above, name = os.path.split(path)
    if not os.path.isdir(above or "."):
        raise CheckpointNotFoundError(f"{path} does not exist, nor does the folder {above}.")
    raise CheckpointNotFoundError(f"{path} does not exist.{closest(name, os.listdir(above or '.'))}")
