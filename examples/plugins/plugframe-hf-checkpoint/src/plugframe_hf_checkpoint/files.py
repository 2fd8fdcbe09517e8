"""Files of weights: model.safetensors, or model-00001-of-00002.safetensors and an index."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from plugframe.checkpoint import Checksum
from plugframe.errors import CheckpointCorruptError

#: The name of the two files with everything that is not of Hugging Face.
RUN = "plugframe_run"
INDEX = "model.safetensors.index.json"
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)


class Shards:
    """The weights in a folder."""

    def __init__(self, folder: str, shard_bytes: int = 0) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors in files of at most `shard_bytes`, one at a time."""
        groups: list[dict[str, Tensor]] = [{}]
        for name, tensor in tensors.items():
            if groups[-1] and tensor.nbytes + sum(t.nbytes for t in groups[-1].values()) > self.shard_bytes:
                groups.append({})
            groups[-1][name] = tensor
        if len(groups) == 1:
            write_tensors(os.path.join(self.folder, "model.safetensors"), groups[0])
            return
        weight_map: dict[str, str] = {}
        for number, group in enumerate(groups, 1):
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            write_tensors(os.path.join(self.folder, name), group)
            weight_map |= dict.fromkeys(group, name)
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        with open(os.path.join(self.folder, INDEX), "w", encoding="utf-8") as file:
            json.dump(index, file, indent=2)

    def read(self) -> dict[str, Any]:
        """Return the tensors of all files."""
        index = os.path.join(self.folder, INDEX)
        names = ["model.safetensors"]
        if os.path.isfile(index):
            with open(index, encoding="utf-8") as file:
                names = sorted({os.path.basename(name) for name in json.load(file)["weight_map"].values()})
        return {key: value for name in names for key, value in read_tensors(os.path.join(self.folder, name)).items()}


def write_tensors(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file and force it to disk."""
    save_file({n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}, path, {"format": "pt"})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def read_tensors(path: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, which do not depend on the file."""
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointCorruptError(f"{path} is not a complete safetensors file: {error}") from None


def file_checksum(path: str) -> list[str]:
    """Return the checksums of a file."""
    checksum = Checksum()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            checksum.update(data)
    return list(checksum.result())
