"""The layout: weights and configuration as of Hugging Face, everything else in two files of plugframe."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plugframe.base import Checkpoint
from plugframe.checkpoint import draft_name, exchange, join, on_all_ranks, remove_leftovers, seal, split, unseal
from plugframe.errors import CheckpointCorruptError, CheckpointError
from plugframe.hooks import SaveHandle, hookimpl
from plugframe.utils.logging import warn_caller
from plugframe_hf_checkpoint.files import DTYPES, RUN, Shards, file_checksum, read_tensors, write_tensors


class HuggingFaceCheckpoint(Checkpoint):
    """Write a folder that ``from_pretrained`` reads, with the optimizer and the rest of the state beside the weights.

    Args:
        model: key of the model in the saved state.
        shard_gb: largest size of a file of weights in GB.
    """

    def __init__(self, *, model: str = "model", shard_gb: float = 5.0) -> None:
        self.model, self.shard_bytes = model, int(shard_gb * 1e9)

    @hookimpl
    def checkpoint_save(
        self, path: str, state: Mapping[str, Any], info: Mapping[str, Any], wait: bool
    ) -> SaveHandle | None:
        first = self.context.world.global_rank == 0
        on_all_ranks(self.context, f"cannot write {path}", lambda: self._write(path, state, info) if first else None)
        return None

    @hookimpl
    def checkpoint_load(self, path: str, trusted: bool, lazy: bool) -> dict[str, Any]:
        return on_all_ranks(self.context, f"cannot read {path}", lambda: self._read(path))[0]

    def _write(self, path: str, state: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        if "://" in path or (os.path.lexists(path) and not is_checkpoint(path)):
            raise CheckpointError(f"cannot write {path}: it is no folder of such a checkpoint: give another path.")
        model = state.get(self.model)
        weights = {k: v for k, v in model.items() if isinstance(v, Tensor)} if isinstance(model, Mapping) else {}
        # The weights of the model, in their order, are None in the rest.
        rest = {**state, self.model: {k: None if k in weights else v for k, v in model.items()}} if weights else state
        split(state, dtypes=DTYPES, where=path)  # raises with the key of every value that cannot be saved
        (tensors, structure), (others, rest_structure) = (split(each, dtypes=DTYPES) for each in (weights, rest))
        about = info.get("modules", {}).get(self.model) or {}
        folder, target = draft_name(path), os.path.realpath(path)
        remove_leftovers(target)
        os.makedirs(folder)
        try:
            Shards(folder, self.shard_bytes).write(tensors)
            write_tensors(os.path.join(folder, f"{RUN}.safetensors"), others)
            if about.get("config") is not None:
                config = {"architectures": [about["class"]], **about["config"]}
                with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
                    json.dump(config, file, indent=2)
            elif about:
                warn_caller(f"{path} has no config.json: {about['class']} has no `config` of plain values.")
            body = {
                "format": RUN,
                "model": self.model,
                "weights": structure,
                "rest": rest_structure,
                "info": split(info)[1],
                "files": {name: file_checksum(os.path.join(folder, name)) for name in sorted(os.listdir(folder))},
            }
            with open(os.path.join(folder, f"{RUN}.json"), "wb") as manifest:
                manifest.write(seal(body))
                os.fsync(manifest.fileno())
            if os.path.lexists(target):
                exchange(folder, target)
            else:
                os.rename(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # a draft, or what was there before

    def _read(self, path: str) -> dict[str, Any]:
        manifest = os.path.join(path, f"{RUN}.json")
        if not os.path.isfile(manifest):
            if not os.path.isfile(os.path.join(path, "config.json")):
                raise CheckpointError(
                    f"{path} is not a checkpoint of Hugging Face: it has neither {RUN}.json nor a config."
                )
            return {self.model: Shards(path).read()}  # of save_pretrained: nothing can be verified
        with open(manifest, "rb") as file:
            body = json.loads(unseal(file.read(), where=manifest))
        for name, expected in body["files"].items():
            file_name = os.path.join(path, os.path.basename(name))
            found = file_checksum(file_name) if os.path.isfile(file_name) else ["no file"]
            if found != expected:
                raise CheckpointCorruptError(
                    f"{file_name} is not what was written: expected {expected}, found {found}."
                )
        state = join(read_tensors(os.path.join(path, f"{RUN}.safetensors")), body["rest"], where=path)
        weights = join(Shards(path).read(), body["weights"], where=path)
        if weights:
            state[body["model"]].update(weights)
        return dict(state)


def is_checkpoint(path: str) -> bool:
    """Return whether a path is a folder that this format wrote."""
    return os.path.isdir(path) and os.path.isfile(os.path.join(path, f"{RUN}.json"))
