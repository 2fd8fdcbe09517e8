"""The checkpoint plugin ``safetensors``: rank 0 writes, every rank reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plugframe.base import Checkpoint
from plugframe.checkpoint import Contents, StoredTensor
from plugframe.errors import CheckpointError
from plugframe.hooks import SaveHandle, hookimpl
from plugframe_builtins._shared.checkpoint_files import formats, tensor_file
from plugframe_builtins.safetensors_checkpoint import writer


class SafetensorsCheckpoint(Checkpoint):
    """Write one file per checkpoint, in the safetensors format, which other tools read too."""

    @hookimpl
    def checkpoint_save(
        self, path: str, state: Mapping[str, Any], info: Mapping[str, Any], wait: bool
    ) -> SaveHandle | None:
        failure: CheckpointError | None = None
        if self.context.world.global_rank == 0:
            failure = _try_write(path, state, info)
        text = self.context.hooks.collective_broadcast_object(obj=str(failure) if failure else None, src=0, group=None)
        if text is not None:
            # Rank 0's has the cause.
            raise failure or CheckpointError(text)
        return None

    @hookimpl
    def checkpoint_load(self, path: str, trusted: bool, lazy: bool) -> dict[str, Any]:
        return formats.load(path, trusted=trusted, lazy=lazy, context=self.context)

    def inspect(self, path: str) -> Contents:
        return formats.inspect(path)

    def unfinished(self, path: str) -> bool:
        return formats.unfinished(path)

    def export(self, path: str, tensors: Mapping[str, Tensor | StoredTensor]) -> None:
        tensor_file.write_plain(path, tensors)


def _try_write(path: str, state: Mapping[str, Any], info: Mapping[str, Any]) -> CheckpointError | None:
    try:
        writer.write(path, state, info)
    except CheckpointError as error:
        return error
    except Exception as error:  # noqa: BLE001 the other ranks wait for the outcome
        failure = CheckpointError(f"cannot write {path}: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure
    return None
