"""Weights of a model in Hugging Face's layout: one file, or several and an index."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from plugframe.errors import CheckpointError


def write(state: Mapping[str, Any], folder: Path, limit: int) -> None:
    """Write tensors to ``model.safetensors``, or to several files of at most `limit` bytes and their index.

    A tensor under several names is written under the first. What is at the place of a file stays there until the new
    one is complete.

    Raises:
        CheckpointError: for a value that is no tensor.
    """
    files, total = _divided(state, limit)
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    for name, tensors in zip(names, files, strict=True):
        draft = folder / f".{name}.draft"
        save_file(tensors, draft, metadata={"format": "pt"})
        os.replace(draft, folder / name)
    index = folder / "model.safetensors.index.json"
    for old in folder.glob("model*.safetensors"):
        if old.name not in names and re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", old.name):
            old.unlink()
    if len(files) == 1:
        index.unlink(missing_ok=True)
        return
    places = {key: name for name, tensors in zip(names, files, strict=True) for key in tensors}
    draft = folder / f".{index.name}.draft"
    draft.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True))
    os.replace(draft, index)


def _divided(state: Mapping[str, Any], limit: int) -> tuple[list[dict[str, Tensor]], int]:
    """Return the tensors of each file, in order, and the size of all in bytes."""
    files: list[dict[str, Tensor]] = [{}]
    written: set[int] = set()
    size = total = 0
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name!r} of the model is a {type(tensor).__name__}: a file of weights holds tensors."
            )
        if id(tensor) in written:
            continue
        written.add(id(tensor))
        if files[-1] and size + tensor.nbytes > limit:
            files.append({})
            size = 0
        files[-1][name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    return files, total
