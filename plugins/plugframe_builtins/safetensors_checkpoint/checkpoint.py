"""The plugin: rank 0 writes, every rank reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, BinaryIO

from plugframe.base import Checkpoint
from plugframe.errors import CheckpointCorruptError, CheckpointError, closest
from plugframe.hooks import SaveHandle, hookimpl
from plugframe_builtins.safetensors_checkpoint import foreign, layout, reader, writer


class SafetensorsCheckpoint(Checkpoint):
    """One file per checkpoint, in the safetensors format, which other tools read as well."""

    @hookimpl
    def checkpoint_save(
        self, path: str, state: Mapping[str, Any], info: Mapping[str, Any], wait: bool
    ) -> SaveHandle | None:
        failure: CheckpointError | None = None
        if self.context.world.global_rank == 0:
            failure = _try_write(path, state, info)
        text = self.context.hooks.collective_broadcast_object(obj=str(failure) if failure else None, src=0, group=None)
        if text is not None:
            # On rank 0 with its cause.
            raise failure or CheckpointError(text)
        return None

    @hookimpl
    def checkpoint_load(self, path: str, weights_only: bool | None) -> dict[str, Any]:
        _check_present(path)
        try:
            with open(path, "rb") as file:
                kind = _sniff(file, path)
                if kind == "own":
                    return reader.read(file, path)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from error
        if kind == "plain":
            return foreign.read_safetensors(path)
        return foreign.read_torch(path, weights_only=weights_only)


def _try_write(path: str, state: Mapping[str, Any], info: Mapping[str, Any]) -> CheckpointError | None:
    try:
        writer.write(path, state, info)
    except CheckpointError as error:
        return error
    except Exception as error:  # noqa: BLE001 the other ranks wait for word, whatever went wrong here
        failure = CheckpointError(f"cannot write {path}: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure
    return None


def _check_present(path: str) -> None:
    if os.path.isdir(path):
        names = ", ".join(sorted(os.listdir(path))[:5])
        raise CheckpointError(f"{path} is a folder, not a checkpoint file: give the file's name. It holds: {names}.")
    if os.path.isfile(path):
        return
    if os.path.lexists(path):
        raise CheckpointError(f"{path} is not a regular file.")
    folder, name = os.path.split(path)
    if not os.path.isdir(folder or "."):
        raise CheckpointError(f"{path} does not exist, nor does the folder {folder}.")
    raise CheckpointError(f"{path} does not exist.{closest(name, os.listdir(folder or '.'))}")


def _sniff(file: BinaryIO, path: str) -> str:
    """Say whose file it is: "own", "plain" (someone else's safetensors) or "torch"."""
    head = file.read(64)
    size = os.fstat(file.fileno()).st_size
    if size < 10:
        raise CheckpointCorruptError(f"{path} is truncated: found {size} bytes, which no checkpoint fits in.")
    if layout.opens(head):
        return "own"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= layout.MAX_HEADER_BYTES:
        if length > size - 8:
            raise CheckpointCorruptError(f"{path} is truncated: its header has {length} bytes, found {size - 8}.")
        # The mark is there several times, so that damage to one cannot make a plain file of ours.
        file.seek(8)
        return "own" if layout.MARK in file.read(length) else "plain"
    if head.startswith((foreign.ZIP_MAGIC, foreign.LEGACY_MAGIC)):
        return "torch"
    raise CheckpointError(
        f"{path} is not a checkpoint: it begins with {head[:8]!r}, neither safetensors nor torch.save do."
    )
