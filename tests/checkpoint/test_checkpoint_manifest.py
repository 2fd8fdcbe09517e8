"""Manifests describe a checkpoint, and verify themselves."""

from __future__ import annotations

import random

import pytest
import torch
import xxhash

from plugframe.checkpoint import SEGMENT_BYTES, Checksum, Entry, Manifest, digest
from plugframe.errors import CheckpointCorruptError, CheckpointError


def example() -> Manifest:
    return Manifest(
        format="example",
        version=3,
        structure=Entry(dtype="uint8", shape=(5,), size_bytes=5, xxh3=("0000000a0000000a",)),
        tensors={
            "a.b": Entry(dtype="float32", shape=(2, 3), size_bytes=24, xxh3=("deadbeefdeadbeef",)),
            "é": Entry.blank(dtype="bool", shape=(0,), size_bytes=0),
        },
        info={"world_size": 2, "ratio": float("nan"), "names": ("x", {3: None})},
    )


def test_a_manifest_comes_back() -> None:
    """Entries, version and info survive a round trip."""
    manifest = example()
    back = Manifest.from_bytes(manifest.to_bytes(), where="f")
    assert (back.format, back.version, back.structure, back.tensors) == (
        "example",
        3,
        manifest.structure,
        manifest.tensors,
    )
    assert back.info["names"] == ("x", {3: None})
    assert back.info["ratio"] != back.info["ratio"]


def test_every_flipped_bit_of_a_manifest_is_found() -> None:
    """A manifest with a single flipped bit, or truncated, is refused."""
    data = example().to_bytes()
    for position in random.Random(0).sample(range(len(data) * 8), 300):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(CheckpointCorruptError, match=r"^f: its manifest is not what was written"):
            Manifest.from_bytes(bytes(damaged), where="f")
    for length in range(len(data)):
        with pytest.raises(CheckpointCorruptError, match="its manifest is not"):
            Manifest.from_bytes(data[:length], where="f")


def test_a_manifest_of_something_else_is_refused() -> None:
    """JSON that is not a manifest is refused, even with a correct checksum."""
    for body in (
        b"{",
        b'{"format":1',
        b'{"structure":[1],"tensors":{},"format":"","version":1,"info":{}',
        b"[[[[",
    ):
        data = body + b',"xxh3":"%b"}' % digest(body).encode()
        with pytest.raises(CheckpointCorruptError, match="its manifest is invalid"):
            Manifest.from_bytes(data, where="f")


def test_checksums_do_not_change_the_length() -> None:
    """A blank manifest is as long as the filled one, so its position in the file is known beforehand."""
    size = 2 * SEGMENT_BYTES + 1
    entries = [Entry.blank(dtype="uint8", shape=(size,), size_bytes=size)]
    entries.append(
        Entry(dtype="uint8", shape=(size,), size_bytes=size, xxh3=("00000001" * 2, "ffffffff" * 2, "12345678" * 2))
    )
    lengths = {
        len(Manifest(format="f", version=1, structure=entry, tensors={"a": entry}).to_bytes()) for entry in entries
    }
    assert len(lengths) == 1


def test_info_holds_plain_values_only() -> None:
    """A tensor or an object in the info is refused by key."""
    entry = Entry.blank(dtype="uint8", shape=(0,), size_bytes=0)
    with pytest.raises(CheckpointError, match="holds a tensor: put 'step' into the state"):
        Manifest(format="f", version=1, structure=entry, tensors={}, info={"step": torch.ones(1)}).to_bytes()
    with pytest.raises(CheckpointError, match=r"manifest's info.*\['plugins'\] is a set"):
        Manifest(format="f", version=1, structure=entry, tensors={}, info={"plugins": {1}}).to_bytes()


def test_checksums_are_of_segments_however_the_bytes_come() -> None:
    """There is one xxh3 per segment, whatever the sizes of updates, and none for empty data."""
    data = random.Random(0).randbytes(1000) * (2 * SEGMENT_BYTES // 1000 + 1)
    data = data[: 2 * SEGMENT_BYTES + 7]
    expected = tuple(
        xxhash.xxh3_64_hexdigest(data[at : at + SEGMENT_BYTES]) for at in range(0, len(data), SEGMENT_BYTES)
    )
    for bite in (len(data), SEGMENT_BYTES, SEGMENT_BYTES - 3, 5_000_001):
        checksum = Checksum()
        for at in range(0, len(data), bite):
            checksum.update(data[at : at + bite])
        assert checksum.result() == expected
    assert Checksum().result() == ()
