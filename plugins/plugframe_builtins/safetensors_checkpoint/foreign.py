"""Files that others wrote: plain safetensors, and torch.save."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from plugframe.errors import CheckpointCorruptError, CheckpointError
from plugframe_builtins.checkpoint_files import tensorfile
from plugframe_builtins.checkpoint_files.found import Found, Head, laid_whole

ZIP_MAGIC = b"PK\x03\x04"
#: How the files of torch.save began before they were zip archives.
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read_safetensors(path: str) -> dict[str, Any]:
    """Return the tensors of a safetensors file by name; the format has no checksums to verify."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # The library's tensors lie on the file; a clone is independent of what becomes of it.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 not a dict
    except SafetensorError as error:
        raise CheckpointCorruptError(f"{path} is not a whole safetensors file: {error}.") from error


def find(file: BinaryIO, path: str) -> Found | None:
    """Return what a safetensors file holds, to be read later; None if it holds a dtype that has to be read whole.

    Raises:
        CheckpointCorruptError: if it is not whole.
    """
    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass  # the library knows what makes a file whole
    except SafetensorError as error:
        raise CheckpointCorruptError(f"{path} is not a whole safetensors file: {error}.") from error
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    try:
        slots = tensorfile.unpack_slots(file.read(length))
    except KeyError:
        return None
    size_bytes = os.fstat(file.fileno()).st_size
    return Found(
        path=path,
        format="safetensors",
        version=0,
        size_bytes=size_bytes,
        structure={"dict": {name: {"tensor": name} for name in slots}},
        tensors={name: laid_whole(slot, 8 + length) for name, slot in slots.items()},
        files={"": Head(size_bytes=size_bytes, head_bytes=8 + length, xxh3=None)},
        identity=str(size_bytes),
    )


def read_torch(path: str, *, trusted: bool) -> dict[str, Any]:
    """Return the dict in a file of ``torch.save``; its code runs only if `trusted`.

    Raises:
        CheckpointError: if it holds code and is not `trusted`, or something else than a dict.
    """
    _check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=not trusted, mmap=False)
    except Exception as error:
        raise _explain(path, error) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} is a torch.save file that holds a {type(state).__name__}, not a dict: read it with torch.load."
        )
    return state


def _check_archive(path: str) -> None:
    """Refuse zip archives that torch.save did not write: torch.load would run those of TorchScript."""
    with open(path, "rb") as file:
        if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
            return
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise CheckpointCorruptError(f"{path} is no whole torch.save file: {error}.") from error
    if "constants.pkl" in names:
        raise CheckpointError(f"{path} is a TorchScript archive, which is code: read it with torch.jit.load.")
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is a zip archive, but not one of torch.save.")


def _explain(path: str, error: Exception) -> CheckpointError:
    text = str(error) or type(error).__name__
    named = re.search(r"GLOBAL ([\w.]+)|Unsupported class ([\w.]+)", text)
    if isinstance(error, pickle.UnpicklingError) and named:
        return CheckpointError(
            f"{path} is a torch.save file that holds code ({named[1] or named[2]}), and none of it was run: "
            "pass trusted=True only if you trust whoever wrote it."
        )
    detail = re.search(r"WeightsUnpickler error: (.+)", text)
    return CheckpointCorruptError(
        f"{path} is no whole torch.save file: {(detail[1] if detail else text.splitlines()[0]).rstrip('.')}."
    )
