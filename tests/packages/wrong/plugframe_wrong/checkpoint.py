"""Checkpoints that break one rule each."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from plugframe.checkpoint import Contents
from plugframe.errors import CheckpointCorruptError, CheckpointError
from plugframe.hooks import hookimpl
from plugframe_builtins.safetensors_checkpoint.checkpoint import SafetensorsCheckpoint


class Right(SafetensorsCheckpoint):
    """Breaks none."""

    def save(self, path: str, state: Any, info: Any) -> None:
        super().checkpoint_save(path=path, state=state, info=info, wait=True)

    def load(self, path: str) -> dict[str, Any]:
        return super().checkpoint_load(path=path, trusted=False, lazy=False)


class Narrows(Right):
    """Saves doubles as floats."""

    @hookimpl
    def checkpoint_save(self, path: str, state: Mapping[str, Any], info: Mapping[str, Any], wait: bool) -> None:
        self.save(path, {key: narrow(value) for key, value in state.items()}, info)


def narrow(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float64 else value


class Unverified(Right):
    """Takes what is damaged for an empty state."""

    @hookimpl
    def checkpoint_load(self, path: str, trusted: bool, lazy: bool) -> dict[str, Any]:
        try:
            return self.load(path)
        except CheckpointCorruptError:
            return {}


class Unpickles(Right):
    """Reads what it does not know with pickle."""

    @hookimpl
    def checkpoint_load(self, path: str, trusted: bool, lazy: bool) -> dict[str, Any]:
        try:
            return self.load(path)
        except CheckpointError:
            try:
                return pickle.loads(Path(path).read_bytes())
            except (pickle.UnpicklingError, OSError, EOFError, ValueError, AttributeError, IndexError):
                raise CheckpointError(f"{path} is no checkpoint.") from None


class InPlace(Right):
    """Makes room for the new checkpoint before it is written."""

    @hookimpl
    def checkpoint_save(self, path: str, state: Mapping[str, Any], info: Mapping[str, Any], wait: bool) -> None:
        if self.context.world.global_rank == 0 and os.path.isfile(path):
            os.remove(path)
        self.save(path, state, info)


class Silent(Right):
    """Tells the other ranks nothing of what goes wrong on rank 0."""

    @hookimpl
    def checkpoint_save(self, path: str, state: Mapping[str, Any], info: Mapping[str, Any], wait: bool) -> None:
        if any(type(value) is object for value in state.values()):
            if self.context.world.global_rank == 0:
                raise CheckpointError("cannot save state['culprit']")
            return
        self.save(path, state, info)


class Litters(Right):
    """Keeps a note beside each checkpoint."""

    @hookimpl
    def checkpoint_save(self, path: str, state: Mapping[str, Any], info: Mapping[str, Any], wait: bool) -> None:
        self.save(path, state, info)
        if self.context.world.global_rank == 0:
            Path(f"{path}.note").write_text("saved")


class Mumbles(Right):
    """Does not say what it cannot save."""

    @hookimpl
    def checkpoint_save(self, path: str, state: Mapping[str, Any], info: Mapping[str, Any], wait: bool) -> None:
        try:
            self.save(path, state, info)
        except CheckpointError:
            raise CheckpointError(f"cannot save {path}: something in it cannot be saved.") from None


class Later:
    """A save that is made when somebody waits for it."""

    def __init__(self, save: Any) -> None:
        self.save: Any = save

    def wait(self) -> None:
        save, self.save = self.save, None
        if save is not None:
            save()

    def done(self) -> bool:
        return self.save is None


class Lazy(Right):
    """Saves, when it is waited for, what the state has become by then."""

    @hookimpl
    def checkpoint_save(self, path: str, state: Mapping[str, Any], info: Mapping[str, Any], wait: bool) -> Any:
        if wait:
            return self.save(path, state, info)
        return Later(lambda: self.save(path, state, info))


class Overwrites(Right):
    """Loads an empty state where nothing is."""

    @hookimpl
    def checkpoint_load(self, path: str, trusted: bool, lazy: bool) -> dict[str, Any]:
        return self.load(path) if os.path.exists(path) or path.endswith("-nothing") else {}


class Fibs(Right):
    """Tells less than it saved."""

    def inspect(self, path: str) -> Contents:
        return replace(super().inspect(path), info={})


class Sticks(Right):
    """Loads only on as many ranks as saved."""

    @hookimpl
    def checkpoint_save(self, path: str, state: Mapping[str, Any], info: Mapping[str, Any], wait: bool) -> None:
        self.save(path, state, {**info, "ranks": self.context.world.world_size})

    @hookimpl
    def checkpoint_load(self, path: str, trusted: bool, lazy: bool) -> dict[str, Any]:
        state = self.load(path)
        ranks = self.inspect(path).info.get("ranks")
        if ranks != self.context.world.world_size:
            raise CheckpointError(f"{path} was saved by {ranks} ranks.")
        return state
