"""The sharded format: a folder of data files, and a manifest that is written last and commits them.

Each data file is a safetensors file with one rank's chunks, or, in torch's layout, one archive of ``torch.save`` per
chunk; then the folder also holds torch's metadata, which is never read here. File names are unique to a save, so
that the next save can write beside them; the manifest lists the files that belong to the checkpoint.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from plugframe.checkpoint import (
    MAX_MANIFEST_BYTES,
    checked_size,
    checked_sums,
    dtype_name,
    dtype_of,
    info_of,
    is_digest,
    names_text,
    parse_structure,
    printable_cause,
    seal,
    split,
    unseal,
)
from plugframe.errors import CheckpointCorruptError, CheckpointError, CheckpointUnfinishedError
from plugframe_builtins._shared.checkpoint_files.coverage import fills, fills_file
from plugframe_builtins._shared.checkpoint_files.index import Chunk, Gap, Head, Index, TensorLayout
from plugframe_builtins._shared.checkpoint_files.regular_file import open_regular

FORMAT = "plugframe sharded"
VERSION = 1
MANIFEST = "manifest.json"
#: The metadata of torch.distributed.checkpoint: a pickle.
TORCH_METADATA = ".metadata"

#: First bytes of a manifest of any version.
OPENING = b'{"format":"plugframe sharded","version":'
_VERSION = re.compile(re.escape(OPENING) + rb"(\d{1,9}),")
_DATA = re.compile(r"[0-9a-f]{16}-\d{5,}\.(safetensors|distcp)")
_DRAFT = re.compile(r"\.(manifest\.json|\.metadata)\.tmp-[0-9a-f]{16}")


def data_name(save_id: str, rank: int, suffix: str = "safetensors") -> str:
    """Return the name of a rank's data file; `suffix` is ``"distcp"`` in torch's layout."""
    return f"{save_id}-{rank:05d}.{suffix}"


def is_data(name: str) -> bool:
    """Return whether a name is that of a data file."""
    return _DATA.fullmatch(name) is not None


def is_ours(name: str) -> bool:
    """Return whether a save may have created a file of that name."""
    return name == MANIFEST or is_data(name) or _DRAFT.fullmatch(name) is not None


def pack(
    *,
    structure: Any,
    info: Mapping[str, Any],
    files: Mapping[str, Head],
    tensors: Mapping[str, TensorLayout],
) -> bytes:
    """Return the bytes of a manifest."""
    info_tensors, packed_info = split(info, where="the manifest's info")
    if info_tensors:
        raise CheckpointError(f"the manifest's info holds a tensor: put {next(iter(info_tensors))!r} into the state.")
    numbers = {name: number for number, name in enumerate(files)}
    body = {
        "format": FORMAT,
        "version": VERSION,
        "info": packed_info,
        "structure": structure,
        "files": {name: _pack_head(head) for name, head in files.items()},
        "tensors": {name: _pack(laid, numbers) for name, laid in tensors.items()},
    }
    return seal(body)


def _pack_head(head: Head) -> list[Any]:
    gaps = [[gap.start, gap.size_bytes, gap.xxh3] for gap in head.gaps]
    return [head.size_bytes, head.head_bytes, head.xxh3, *([gaps] if gaps else [])]


def _pack(laid: TensorLayout, numbers: Mapping[str, int]) -> list[Any]:
    chunks = [[c.offsets, c.sizes, numbers[c.file], c.start, c.xxh3] for c in laid.chunks]
    return [dtype_name(laid.dtype), laid.shape, chunks]


def find(path: str) -> Index:
    """Return the index in a folder's manifest.

    Raises:
        CheckpointError: if the folder is not a checkpoint, or of a newer version of this format.
        CheckpointCorruptError: if the manifest is damaged.
    """
    data: bytes | None = None
    where = os.path.join(path, MANIFEST)
    with suppress(FileNotFoundError), open_regular(where) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_MANIFEST_BYTES:
            raise CheckpointCorruptError(f"{where}: it is not a manifest: it has {size} bytes.")
        data = file.read(len(OPENING))
        # Bytes that do not begin as a manifest are not read further: the file may be huge.
        data += file.read() if data == OPENING else file.read(64 * 1024)
    return unpack(path, data, lambda: os.listdir(path))


def unpack(path: str, data: bytes | None, list_names: Callable[[], Iterable[str]]) -> Index:
    """Return the index in a manifest.

    Args:
        path: the folder, for messages.
        data: the manifest's bytes, None if there is none.
        list_names: returns the names in the folder, for the error if it is not a checkpoint.

    Raises:
        CheckpointError, CheckpointCorruptError: see `find`.
    """
    if data is None:
        raise _without_manifest(path, list_names())
    where = os.path.join(path, MANIFEST)
    opening = _VERSION.match(data)
    if opening is None and b'"format":"plugframe' not in data[:64] and not any(map(is_data, list_names())):
        raise CheckpointError(f"{path} is a folder, but its {MANIFEST} is not one of a checkpoint.")
    body = unseal(data, where=where)
    if opening is not None and int(opening[1]) > VERSION:
        raise CheckpointError(
            f"{path} was written by a newer plugframe (format {int(opening[1])}, this one reads {VERSION}): "
            "upgrade plugframe."
        )
    try:
        return _unpack(path, parse_structure(body), data)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        text = repr(error)[:300]
        raise CheckpointCorruptError(f"{where}: it is not a manifest: {text}.") from printable_cause(error)


def opens(path: str) -> bool:
    """Return whether a folder's manifest, perhaps damaged, begins as this format does."""
    with suppress(OSError, CheckpointError), open_regular(os.path.join(path, MANIFEST)) as file:
        return file.read(len(OPENING)) == OPENING
    return False


def is_unfinished(names: Iterable[str]) -> bool:
    """Return whether a folder with these names is an abandoned save without a manifest."""
    names = set(names)
    return MANIFEST not in names and all(map(is_ours, names))


def is_checkpoint(path: str) -> bool:
    """Return whether the folder at `path` is a sharded checkpoint and holds nothing else."""
    names = os.listdir(path)
    return MANIFEST in names and all(is_ours(name) or name == TORCH_METADATA for name in names)


def check_content(path: str, shown: str) -> None:
    """Raise if a folder holds anything that no save of this format created.

    Raises:
        CheckpointError: naming the foreign files.
    """
    names = os.listdir(path)
    opening: bytes | None = None
    if MANIFEST in names:
        with open_regular(os.path.join(path, MANIFEST)) as file:
            opening = file.read(len(OPENING))
    check_names(names, opening, shown)


def check_names(names: Iterable[str], opening: bytes | None, shown: str) -> None:
    """Run `check_content` on the names in a folder and the first bytes of its manifest, if there is one."""
    names = sorted(names)
    foreign = [name for name in names if not is_ours(name)]
    if opening is not None:
        if opening.startswith(OPENING):
            return
        foreign = foreign or ([] if any(map(is_data, names)) else [MANIFEST])
    if foreign:
        raise CheckpointError(
            f"{shown} is a folder that holds something else ({_some(foreign)}): "
            f"give a new folder, such as {os.path.join(shown, 'last')!r}."
        )


def _without_manifest(path: str, names: Iterable[str]) -> CheckpointError:
    names = sorted(names)
    if not names:
        # A save may be killed right after it creates the folder.
        return CheckpointUnfinishedError(f"{path} is not complete: it is an empty folder. Load another checkpoint.")
    if is_unfinished(names):
        return CheckpointUnfinishedError(
            f"{path} is not complete: it has no {MANIFEST}, which is written last. Load another checkpoint."
        )
    return CheckpointError(
        f"{path} is a folder, not a checkpoint file: give the file's name. It holds: {_some(names)}."
    )


def _some(names: Sequence[str]) -> str:
    return names_text(names[:5]) + (", …" if len(names) > 5 else "")


def _unpack(path: str, fields: Any, data: bytes) -> Index:
    if fields["format"] != FORMAT or fields["version"] != VERSION:
        raise ValueError("it is of another format or version")
    if not all(map(is_data, fields["files"])):
        raise ValueError("a file has a name no data file has")
    files = {name: _unpack_head(packed) for name, packed in fields["files"].items()}
    names = list(files)
    tensors = {name: _unpack_tensor(name, packed, names, files) for name, packed in fields["tensors"].items()}
    _check_files(files, tensors)
    return Index(
        path=path,
        format=FORMAT,
        version=VERSION,
        size_bytes=len(data) + sum(head.size_bytes for head in files.values()),
        structure=fields["structure"],
        tensors=tensors,
        files=files,
        info=info_of(fields["info"], where=path),
        identity=data[-10:-2].decode("ascii"),
    )


def _unpack_head(packed: Any) -> Head:
    size_bytes, head_bytes, xxh3, *more = packed
    if not is_digest(xxh3) or len(more) > 1:
        raise ValueError("the header of a file has no checksum")
    gaps = tuple(_unpack_gap(*gap) for gap in (more[0] if more else ()))
    return Head(size_bytes=checked_size(size_bytes), head_bytes=checked_size(head_bytes), xxh3=xxh3, gaps=gaps)


def _unpack_gap(start: Any, size_bytes: Any, xxh3: Any) -> Gap:
    size = checked_size(size_bytes)
    return Gap(start=checked_size(start), size_bytes=size, xxh3=checked_sums(xxh3, size))


def _unpack_tensor(name: str, packed: Any, names: Sequence[str], files: Mapping[str, Head]) -> TensorLayout:
    dtype, shape, chunks = packed
    laid = TensorLayout(dtype=dtype_of(dtype), shape=tuple(map(checked_size, shape)), chunks=())
    # A tensor of no elements may have any shape, but its strides must be numbers torch can hold.
    if math.prod(max(size, 1) for size in laid.shape) >= 2**59:
        raise ValueError(f"tensor {name!r} is out of place")
    made: list[Chunk] = []
    for packed_offsets, packed_sizes, number, start, xxh3 in chunks:
        offsets, sizes = tuple(map(checked_size, packed_offsets)), tuple(map(checked_size, packed_sizes))
        file = names[checked_size(number)]
        inside = len(offsets) == len(sizes) == len(laid.shape)
        if not inside or any(o + s > n for o, s, n in zip(offsets, sizes, laid.shape, strict=True)):
            raise ValueError(f"tensor {name!r} is out of place")
        size_bytes = math.prod(sizes) * laid.dtype.itemsize
        head = files[file]
        if not head.head_bytes <= checked_size(start) <= head.size_bytes - size_bytes:
            raise ValueError(f"tensor {name!r} is out of place")
        sums = checked_sums(xxh3, size_bytes)
        made.append(Chunk(offsets=offsets, sizes=sizes, file=file, start=start, xxh3=sums))
    distinct = len({chunk.offsets for chunk in made}) == len(made)
    if not distinct or not fills(laid.shape, [(chunk.offsets, chunk.sizes) for chunk in made]):
        raise ValueError(f"the chunks of tensor {name!r} do not fill it exactly once")
    return TensorLayout(dtype=laid.dtype, shape=laid.shape, chunks=tuple(made))


def _check_files(files: Mapping[str, Head], tensors: Mapping[str, TensorLayout]) -> None:
    """Raise unless every byte of every file belongs to exactly one of its header, its chunks and its gaps."""
    stretches = {name: [(gap.start, gap.size_bytes) for gap in head.gaps] for name, head in files.items()}
    for laid in tensors.values():
        for chunk in laid.chunks:
            stretches[chunk.file].append((chunk.start, math.prod(chunk.sizes) * laid.dtype.itemsize))
    for name, head in files.items():
        if not fills_file(head.head_bytes, head.size_bytes, stretches[name]):
            raise ValueError(f"the chunks in {name} do not fill it exactly once")
