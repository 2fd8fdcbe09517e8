"""The manifest: what a checkpoint must hold when it is read again, with a checksum of every part.

It is JSON that ends in its own checksum, ``,"xxh3":"1a2b3c4d5e6f7081"}``, which covers every byte before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import xxhash

from plugframe._printable import printable_cause
from plugframe.checkpoint.tree import join, parse_structure, split
from plugframe.errors import CheckpointCorruptError, CheckpointError

_T = TypeVar("_T")
_HEXADECIMAL = frozenset("0123456789abcdef")
#: A longer manifest is none: that of a thousand ranks with a thousand tensors each has a tenth of it.
MAX_MANIFEST_BYTES = 2**30

#: A part has one checksum for each stretch of this many bytes, so that several threads can verify it.
SEGMENT_BYTES = 16 * 1024 * 1024
#: Of a checksum: xxh3 in 64 bits, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md. It finds damage at
#: the speed of memory, and is no defence against forgery: nothing that is read is ever run.
DIGEST_CHARS = 16

_TAIL = b',"xxh3":"%b"}'
_TAIL_BYTES = len(_TAIL % (b"0" * DIGEST_CHARS))


def digest(data: memoryview | bytes) -> str:
    """Return the checksum of these bytes, `DIGEST_CHARS` hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def seal(body: Mapping[str, Any]) -> bytes:
    """Return a JSON object that ends in its own checksum. The order of its keys stays."""
    data = json.dumps(body, allow_nan=False, separators=(",", ":")).encode("ascii")[:-1]
    return data + _TAIL % digest(data).encode()


def unseal(data: bytes, *, where: str) -> bytes:
    """Return the JSON in what `seal` wrote, without the checksum.

    Raises:
        CheckpointCorruptError: if a byte of it is not what was written.
    """
    body, tail = data[:-_TAIL_BYTES], data[-_TAIL_BYTES:]
    if tail != _TAIL % digest(body).encode():
        found = tail.decode("ascii", "backslashreplace")
        raise CheckpointCorruptError(
            f"{where}: its manifest is not what was written: expected it to end in "
            f"{(_TAIL % digest(body).encode()).decode()}, found {found}."
        )
    return body + b"}"


class Checksum:
    """The xxh3 of every segment of a part, taken while its bytes go by."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._sum = xxhash.xxh3_64()
        self._num_bytes = 0

    def update(self, data: memoryview | bytes) -> None:
        view = memoryview(data)
        while len(view):
            part = view[: SEGMENT_BYTES - self._num_bytes]
            self._sum.update(part)
            self._num_bytes += len(part)
            if self._num_bytes == SEGMENT_BYTES:
                self._close()
            view = view[len(part) :]

    def result(self) -> tuple[str, ...]:
        """Return the checksums as `digest` does; nothing may be added after."""
        if self._num_bytes:
            self._close()
        return tuple(self._done)

    def _close(self) -> None:
        self._done.append(self._sum.hexdigest())
        self._sum.reset()
        self._num_bytes = 0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What one part must be.

    Attributes:
        dtype: ``"float32"``; see `dtype_name`.
        shape: of the tensor.
        size_bytes: of its contents.
        xxh3: of each segment of `SEGMENT_BYTES` bytes, the last one shorter; see `Checksum`.
    """

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    xxh3: tuple[str, ...]

    @classmethod
    def blank(cls, *, dtype: str, shape: tuple[int, ...], size_bytes: int) -> Entry:
        """Return an entry whose checksums are not known yet, but take the room they will take."""
        xxh3 = ("0" * DIGEST_CHARS,) * -(-size_bytes // SEGMENT_BYTES)
        return cls(dtype=dtype, shape=shape, size_bytes=size_bytes, xxh3=xxh3)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint must hold.

    Attributes:
        format: the name of the format.
        version: of the format.
        structure: the entry of the structure, see `split`.
        tensors: the entry of each tensor, by name.
        info: plain values about the run that saved it.
    """

    format: str
    version: int
    structure: Entry
    tensors: Mapping[str, Entry]
    info: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return it as JSON with its checksum. Checksums of entries do not change the length.

        Raises:
            CheckpointError: if `info` holds what is no plain value.
        """
        tensors, info = split(self.info, where="the manifest's info")
        if tensors:
            raise CheckpointError(f"the manifest's info holds a tensor: put {next(iter(tensors))!r} into the state.")
        body = {
            "format": self.format,
            "version": self.version,
            "info": info,
            "structure": _pack(self.structure),
            "tensors": {name: _pack(entry) for name, entry in self.tensors.items()},
        }
        return seal(body)

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> Manifest:
        """Return what `to_bytes` wrote.

        Raises:
            CheckpointCorruptError: if a byte of it is not what was written.
        """
        body = unseal(data, where=where)
        try:
            fields = parse_structure(body)
            return cls(
                format=_a(str, fields["format"]),
                version=_a(int, fields["version"]),
                structure=_unpack(fields["structure"]),
                tensors={name: _unpack(packed) for name, packed in fields["tensors"].items()},
                info=info_of(fields["info"], where=where),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            text = repr(error)[:200]
            raise CheckpointCorruptError(f"{where}: its manifest is not one: {text}.") from printable_cause(error)


def info_of(packed: Any, *, where: str) -> dict[str, Any]:
    """Return what a manifest says of the run.

    Raises:
        CheckpointCorruptError: if it is no dict of plain values.
    """
    info = join({}, packed, where=where)
    if not isinstance(info, dict):
        raise CheckpointCorruptError(f"{where}: its info is a {type(info).__name__}, not a dict.")
    return info


def checked_size(value: Any) -> int:
    """Return a number of bytes or elements from a manifest; a ValueError for anything else."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{str(value)[:40]!r} is no size")
    return value


def checked_sums(value: Any, size_bytes: int) -> tuple[str, ...]:
    """Return the checksums of a part of that size; a ValueError for any other number of them, or what is none."""
    sums = tuple(_a(list, value))
    if len(sums) != -(-size_bytes // SEGMENT_BYTES) or not all(map(is_digest, sums)):
        raise ValueError("its checksums are not those of its segments")
    return sums


def is_digest(value: Any) -> bool:
    """Say whether a value is what `digest` returns."""
    return isinstance(value, str) and len(value) == DIGEST_CHARS and set(value) <= _HEXADECIMAL


def _a(cls: type[_T], value: Any) -> _T:
    if type(value) is not cls:
        raise ValueError(f"a {type(value).__name__} stands where a {cls.__name__} belongs")
    return value


def _pack(entry: Entry) -> list[Any]:
    return [entry.dtype, list(entry.shape), entry.size_bytes, list(entry.xxh3)]


def _unpack(packed: Any) -> Entry:
    dtype, shape, size_bytes, xxh3 = _a(list, packed)
    return Entry(
        dtype=_a(str, dtype),
        shape=tuple(map(checked_size, _a(list, shape))),
        size_bytes=checked_size(size_bytes),
        xxh3=checked_sums(xxh3, size_bytes),
    )
