"""Read files of other tools: plain safetensors and torch.save."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from plugframe.checkpoint import names_text, printable_cause
from plugframe.errors import CheckpointCorruptError, CheckpointError
from plugframe_builtins._shared.checkpoint_files import tensor_file
from plugframe_builtins._shared.checkpoint_files.index import Head, Index, one_chunk

ZIP_MAGIC = b"PK\x03\x04"
#: First bytes of torch.save files from before the zip format.
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read_safetensors(path: str) -> dict[str, Any]:
    """Return the tensors of a safetensors file by name; the format has no checksums."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # The library's tensors are backed by the file; clones do not depend on it.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 not a dict
    except SafetensorError as error:
        raise _no_safetensors(path, error) from printable_cause(error)


def _no_safetensors(path: str, error: Exception) -> CheckpointCorruptError:
    return CheckpointCorruptError(f"{path} is not a complete safetensors file: {str(error)[:300]}.")


def find(file: BinaryIO, path: str) -> Index | None:
    """Return the index of a safetensors file, or None if torch lacks one of its dtypes.

    Raises:
        CheckpointCorruptError: if the file is incomplete.
    """
    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass  # the library checks the file
    except SafetensorError as error:
        raise _no_safetensors(path, error) from printable_cause(error)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    try:
        slots = tensor_file.unpack_slots(file.read(length))
    except tensor_file.UnknownDtype:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _no_safetensors(path, error) from printable_cause(error)
    size_bytes = os.fstat(file.fileno()).st_size
    return Index(
        path=path,
        format="safetensors",
        version=0,
        size_bytes=size_bytes,
        structure={"dict": {name: {"tensor": name} for name in slots}},
        tensors={name: one_chunk(slot, 8 + length) for name, slot in slots.items()},
        files={"": Head(size_bytes=size_bytes, head_bytes=8 + length, xxh3=None)},
        identity=str(size_bytes),
    )


def read_torch(path: str, *, trusted: bool) -> dict[str, Any]:
    """Return the dict in a ``torch.save`` file; arbitrary code runs only if `trusted`.

    Raises:
        CheckpointError: if the file holds code and is not `trusted`, or holds something other than a dict.
    """
    _check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=not trusted, mmap=False)
    except Exception as error:  # noqa: BLE001 a file may hold anything
        raise _explain(path, error) from printable_cause(error)
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} is a torch.save file that holds a {type(state).__name__}, not a dict: read it with torch.load."
        )
    return state


def _check_archive(path: str) -> None:
    """Raise if a zip archive was not written by torch.save: torch.load would run TorchScript archives."""
    with open(path, "rb") as file:
        if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
            return
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise CheckpointCorruptError(f"{path} is not a complete torch.save file: {error}.") from printable_cause(error)
    if "constants.pkl" in names:
        raise CheckpointError(f"{path} is a TorchScript archive, which is code: read it with torch.jit.load.")
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is a zip archive, but not one of torch.save.")


def _explain(path: str, error: Exception) -> CheckpointError:
    text = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, pickle.UnpicklingError):
        code = [name for name in _globals(path) if not _is_plain(name)]
        if code:
            return CheckpointError(
                f"{path} is a torch.save file that holds code ({names_text(code[:1])}), and none of it was run: "
                "pass trusted=True only if you trust whoever wrote it."
            )
            # Only for display: torch wraps the cause in long advice.
        detail = re.search(r"WeightsUnpickler error: (.+)", str(error))
        text = detail[1] if detail else text
    if isinstance(error, (MemoryError, OSError)):
        return CheckpointError(f"cannot read {path}: {type(error).__name__}: {text[:300].rstrip('.')}.")
    return CheckpointCorruptError(f"{path} is not a complete torch.save file: {text[:300].rstrip('.')}.")


def _globals(path: str) -> list[str]:
    """Return the names that a file's pickles import, in order, without running any of it."""
    found: list[str] = []
    with open(path, "rb") as file, suppress(Exception):  # a pickle may be damaged anywhere
        zipped = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        file.seek(0)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                (entry,) = [each for each in archive.infolist() if each.filename.endswith("/data.pkl")]
                # Skip the archive's own checksum, as torch does: a local header of 30 bytes, a name and extra fields.
            file.seek(entry.header_offset + 26)
            name_bytes, more_bytes = struct.unpack("<HH", file.read(4))
            file.seek(name_bytes + more_bytes, os.SEEK_CUR)
        while file.peek(1):  # the old format is several pickles, then the tensors' bytes
            for name in _globals_of(file):
                found.append(name)
            if zipped:
                break
    return found


def _globals_of(file: IO[bytes]) -> Iterator[str]:
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(texts[-2:])
        elif isinstance(argument, str):
            texts.append(argument)


def _is_plain(name: str) -> bool:
    """Return whether a name is one that every file of tensors imports."""
    module, _, attribute = name.rpartition(".")
    if module == "torch":
        return attribute.endswith("Storage") or isinstance(vars(torch).get(attribute), (torch.dtype, torch.layout))
    rebuilds = module in ("torch._utils", "torch._tensor") and attribute.startswith("_rebuild_")
    return rebuilds or name in ("collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device")
