"""The manifest of a checkpoint: its expected contents, with checksums of every part.

It is JSON that ends in its own checksum, ``,"xxh3":"1a2b3c4d5e6f7081"}``, which covers all bytes before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import xxhash

from plugframe.checkpoint.tree import join, parse_structure, split
from plugframe.errors import CheckpointCorruptError, CheckpointError, printable_cause

_T = TypeVar("_T")
_HEXADECIMAL = frozenset("0123456789abcdef")
#: A longer file is refused: the manifest of a thousand ranks with a thousand tensors each has a tenth of this size.
MAX_MANIFEST_BYTES = 2**30

#: A part has one checksum per segment of this size, so that several threads can verify it.
SEGMENT_BYTES = 16 * 1024 * 1024
#: Length of a checksum: 64-bit xxh3, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md. It detects damage
#: at memory speed. It does not detect forgery, but no data is ever executed.
DIGEST_CHARS = 16

_TAIL = b',"xxh3":"%b"}'
_TAIL_BYTES = len(_TAIL % (b"0" * DIGEST_CHARS))


def digest(data: memoryview | bytes) -> str:
    """Return the checksum of `data`, `DIGEST_CHARS` hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def seal(body: Mapping[str, Any]) -> bytes:
    """Return a JSON object that ends in its own checksum, with the keys in their order."""
    data = json.dumps(body, allow_nan=False, separators=(",", ":")).encode("ascii")[:-1]
    return data + _TAIL % digest(data).encode()


def unseal(data: bytes, *, where: str) -> bytes:
    """Return the JSON written by `seal`, without the checksum.

    Raises:
        CheckpointCorruptError: if the checksum does not match.
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
    """Computes the xxh3 of every segment of a part incrementally."""

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
        """Return the checksums, each like `digest`; nothing may be added afterwards."""
        if self._num_bytes:
            self._close()
        return tuple(self._done)

    def _close(self) -> None:
        self._done.append(self._sum.hexdigest())
        self._sum.reset()
        self._num_bytes = 0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The expected contents of one part.

    Attributes:
        dtype: name of the dtype, such as ``"float32"``; see `dtype_name`.
        shape: shape of the tensor.
        size_bytes: size of its contents.
        xxh3: checksum of each segment of `SEGMENT_BYTES` bytes, the last one shorter; see `Checksum`.
    """

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    xxh3: tuple[str, ...]

    @classmethod
    def blank(cls, *, dtype: str, shape: tuple[int, ...], size_bytes: int) -> Entry:
        """Return an entry with placeholder checksums of the final length."""
        xxh3 = ("0" * DIGEST_CHARS,) * -(-size_bytes // SEGMENT_BYTES)
        return cls(dtype=dtype, shape=shape, size_bytes=size_bytes, xxh3=xxh3)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The expected contents of a checkpoint.

    Attributes:
        format: name of the format.
        version: version of the format.
        structure: entry of the structure, see `split`.
        tensors: entry of each tensor, by name.
        info: plain values about the run that saved it.
    """

    format: str
    version: int
    structure: Entry
    tensors: Mapping[str, Entry]
    info: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the manifest as JSON with its checksum; the length does not depend on the checksums of entries.

        Raises:
            CheckpointError: if `info` holds values that are not plain.
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
        """Return the manifest written by `to_bytes`.

        Raises:
            CheckpointCorruptError: if it is damaged.
        """
        body = unseal(data, where=where)
        try:
            fields = parse_structure(body)
            return cls(
                format=_checked(str, fields["format"]),
                version=_checked(int, fields["version"]),
                structure=_unpack(fields["structure"]),
                tensors={name: _unpack(packed) for name, packed in fields["tensors"].items()},
                info=info_of(fields["info"], where=where),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            text = repr(error)[:200]
            raise CheckpointCorruptError(f"{where}: its manifest is invalid: {text}.") from printable_cause(error)


def info_of(packed: Any, *, where: str) -> dict[str, Any]:
    """Return the info in a manifest.

    Raises:
        CheckpointCorruptError: if it is not a dict of plain values.
    """
    info = join({}, packed, where=where)
    if not isinstance(info, dict):
        raise CheckpointCorruptError(f"{where}: its info is a {type(info).__name__}, not a dict.")
    return info


def checked_size(value: Any) -> int:
    """Return a number of bytes or elements from a manifest.

    Raises:
        ValueError: if it is not a valid size.
    """
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{str(value)[:40]!r} is not a size")
    return value


def checked_sums(value: Any, size_bytes: int) -> tuple[str, ...]:
    """Return the checksums of a part of that size.

    Raises:
        ValueError: if their number is wrong, or one is invalid.
    """
    sums = tuple(_checked(list, value))
    if len(sums) != -(-size_bytes // SEGMENT_BYTES) or not all(map(is_digest, sums)):
        raise ValueError("its checksums do not match its segments")
    return sums


def is_digest(value: Any) -> bool:
    """Return whether a value has the form of a `digest`."""
    return isinstance(value, str) and len(value) == DIGEST_CHARS and set(value) <= _HEXADECIMAL


def _checked(cls: type[_T], value: Any) -> _T:
    if type(value) is not cls:
        raise ValueError(f"expected {cls.__name__}, found {type(value).__name__}")
    return value


def _pack(entry: Entry) -> list[Any]:
    return [entry.dtype, list(entry.shape), entry.size_bytes, list(entry.xxh3)]


def _unpack(packed: Any) -> Entry:
    dtype, shape, size_bytes, xxh3 = _checked(list, packed)
    return Entry(
        dtype=_checked(str, dtype),
        shape=tuple(map(checked_size, _checked(list, shape))),
        size_bytes=checked_size(size_bytes),
        xxh3=checked_sums(xxh3, size_bytes),
    )
