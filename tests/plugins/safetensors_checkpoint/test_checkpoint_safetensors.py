"""The built-in checkpoint: one safetensors file, written by rank 0, verified to the last bit on load."""

from __future__ import annotations

import json
import os
import random
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from safetensors import safe_open

from checkpoint_trees import DTYPES, plugin, random_tensor, same, trees
from plugframe.checkpoint import SEGMENT_BYTES, Checksums
from plugframe.errors import CheckpointCorruptError, CheckpointError
from plugframe_builtins import safetensors_checkpoint
from plugframe_builtins._shared.checkpoint_files import single_file, tensor_file
from plugframe_builtins.safetensors_checkpoint import writer


def save(path: Path | str, state: Any, **info: Any) -> None:
    assert plugin().checkpoint_save(path=str(path), state=state, info=info, wait=True) is None


def load(path: Path | str, trusted: bool = False) -> dict[str, Any]:
    return plugin().checkpoint_load(path=str(path), trusted=trusted, lazy=False)


def small() -> dict[str, Any]:
    return {
        "model": {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([True, False])},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}],
        },
        "epoch": 3,
        "best": float("-inf"),
    }


def test_the_descriptor_is_the_default_and_claims_no_more_than_it_does() -> None:
    """It is what "auto" picks, and promises neither shards nor asynchronous saves."""
    descriptor = safetensors_checkpoint.plugin
    assert descriptor.priority == 100
    assert descriptor.provides == ()


@settings(deadline=None, database=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(state=trees())
def test_any_state_comes_back_from_the_file(tmp_path_factory: pytest.TempPathFactory, state: dict[Any, Any]) -> None:
    """Whatever tree is saved is loaded again to the last bit."""
    path = tmp_path_factory.getbasetemp() / "any.ckpt"
    save(path, state)
    assert same(load(path), state)


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    """All dtypes, in all bit patterns, also scalar and empty, contiguous or not."""
    state = {
        f"{dtype}{shape}": random_tensor(dtype, shape, seed=1).t()
        if len(shape) == 2
        else random_tensor(dtype, shape, seed=1)
        for dtype in DTYPES
        for shape in ((), (0,), (3, 5), (2, 0, 1))
    }
    save(tmp_path / "a", state)
    assert same(load(tmp_path / "a"), state)


def test_tensors_of_many_segments_come_back(tmp_path: Path) -> None:
    """Tensors larger than what is read and written at a time, contiguous or not, and many small ones among them."""
    rows = SEGMENT_BYTES // 4096 // 4 * 2 + 1
    big = torch.arange(rows * 4096, dtype=torch.int32).reshape(rows, 4096)
    state = {"big": big, "turned": big.t(), "small": [torch.full((3,), number) for number in range(300)]}
    save(tmp_path / "a", state)
    back = load(tmp_path / "a")
    assert torch.equal(back["big"], big)
    assert torch.equal(back["turned"], big.t())
    assert same(back["small"], state["small"])


def test_loaded_tensors_are_the_callers_own(tmp_path: Path) -> None:
    """They can be written to, need no gradient, and outlive the file."""
    save(tmp_path / "a", {"w": torch.nn.Parameter(torch.ones(4))})
    first, second = load(tmp_path / "a")["w"], load(tmp_path / "a")["w"]
    (tmp_path / "a").write_bytes(b"")
    first.add_(1)
    assert not first.requires_grad
    assert second.tolist() == [1.0] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_device_come_back_on_the_cpu(tmp_path: Path) -> None:
    """A tensor is copied off its device piece by piece, strided or not."""
    big = torch.randn(3000, 3000, device="cuda")
    save(tmp_path / "a", {"w": big, "turned": big.t(), "scalar": big[0, 0]})
    assert same(load(tmp_path / "a"), {"w": big.cpu(), "turned": big.t().cpu(), "scalar": big[0, 0].cpu()})


def test_other_tools_read_the_file(tmp_path: Path) -> None:
    """The file is plain safetensors: the tensors are there by name, and the manifest in JSON."""
    path = tmp_path / "last.ckpt"
    save(path, small(), world_size=2)
    with safe_open(str(path), framework="pt") as file:
        assert torch.equal(file.get_tensor("model.weight"), small()["model"]["weight"])
        assert file.get_tensor("model.bias").tolist() == [True, False]
        assert file.get_tensor("optimizer.state.0.step").item() == 3.0
        assert file.metadata()["format"] == "pt"
        manifest = json.loads(bytes(file.get_tensor(single_file.MANIFEST).tolist()))
        assert set(file.keys()) == {*manifest["tensors"], single_file.STRUCTURE, single_file.MANIFEST}
    assert manifest["info"] == {"dict": {"world_size": 2}}
    expected = xxhash.xxh3_64_hexdigest(bytes(small()["model"]["bias"].tolist()))
    assert manifest["tensors"]["model.bias"] == ["bool", [2], 2, [expected]]


def test_tensors_lie_aligned(tmp_path: Path) -> None:
    """Readers that map the file need each tensor at a multiple of its element size."""
    save(tmp_path / "a", {str(dtype): random_tensor(dtype, (3,), seed=0) for dtype in DTYPES})
    header = (tmp_path / "a").read_bytes()
    length = int.from_bytes(header[:8], "little")
    slots = single_file.parse_header(header[8 : 8 + length], where="a")
    assert length % 8 == 0
    assert all(slot.start % slot.dtype.itemsize == 0 for slot in slots.values())


def test_rank_0_writes_and_all_ranks_hear_how_it_went(tmp_path: Path) -> None:
    """The other ranks write nothing, and return or raise as rank 0 did, with the same words."""
    wire: list[Any] = []

    def rank_0(obj: Any, src: int, group: Any) -> Any:
        wire.append(obj)
        return obj

    def rank_1(obj: Any, src: int, group: Any) -> Any:
        assert (obj, src, group) == (None, 0, None)
        return wire.pop()

    first = plugin(rank=0, world_size=2, broadcast=rank_0)
    second = plugin(rank=1, world_size=2, broadcast=rank_1)
    for path, state, text in [
        (tmp_path / "last.ckpt", small(), None),
        (tmp_path, small(), "is a folder"),
        (tmp_path / "last.ckpt", {"a": {1}}, "a set"),
    ]:
        texts = []
        for checkpoint in (first, second):
            before = path.stat().st_mtime_ns if path.exists() else None
            try:
                checkpoint.checkpoint_save(path=str(path), state=state, info={}, wait=True)
                texts.append("")
            except CheckpointError as error:
                texts.append(str(error))
                assert path.stat().st_mtime_ns == before
        assert texts[0] == texts[1]
        assert (text or "") in texts[0]
        assert bool(texts[0]) is bool(text)
    assert same(load(tmp_path / "last.ckpt"), small())


def test_an_unforeseen_error_reaches_all_ranks_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 broadcasts any error before it raises, so that no rank waits for it."""
    told = []

    def broadcast(obj: Any, src: int, group: Any) -> Any:
        told.append(obj)
        return obj

    monkeypatch.setattr(writer, "pieces", lambda *args, **kwargs: 1 / 0)
    path = tmp_path / "last.ckpt"
    with pytest.raises(CheckpointError, match="ZeroDivisionError: division by zero") as caught:
        plugin(broadcast=broadcast).checkpoint_save(path=str(path), state=small(), info={}, wait=True)
    assert told == [str(caught.value)]
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert os.listdir(tmp_path) == []


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused values, a full disk and a failing rename cost the new checkpoint, never the old one."""
    path = tmp_path / "last.ckpt"
    save(path, small())
    with pytest.raises(CheckpointError, match=r"cannot save .*last\.ckpt, nothing was written: state\['x'\]"):
        save(path, {"x": object()})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5}))
        with pytest.raises(CheckpointError, match="has 5 bytes free"):
            save(path, {"x": 1})
    with monkeypatch.context() as patch:
        patch.setattr(tensor_file, "MAX_HEADER_BYTES", 50)
        with pytest.raises(CheckpointError, match=r"cannot write .*last\.ckpt: 3 tensors need a header of \d+ bytes"):
            save(path, {"x": torch.ones(1)})
    assert same(load(path), small())
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_no_flipped_bit_loads(tmp_path: Path) -> None:
    """A file with any single bit flipped, in length, header, padding or data, never loads."""
    path = tmp_path / "last.ckpt"
    save(path, small())
    whole = path.read_bytes()
    positions = [*range(64 * 8), *random.Random(0).sample(range(64 * 8, len(whole) * 8), 300)]
    padding = 7 + int.from_bytes(whole[:8], "little")
    for position in [*positions, padding * 8 + 1]:
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="last.ckpt"):
            load(path)
    path.write_bytes(whole)
    assert same(load(path), small())


def test_no_shortened_or_lengthened_file_loads(tmp_path: Path) -> None:
    """A file that lacks its end, anywhere, or has more than was written, is corrupt."""
    path = tmp_path / "last.ckpt"
    save(path, small())
    whole = path.read_bytes()
    for length in [*range(64), *range(64, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointCorruptError, match="truncated|not what was written"):
            load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(
        CheckpointCorruptError, match=rf"longer than .*expected {len(whole)} bytes, found {len(whole) + 1}"
    ):
        load(path)


def test_a_wrong_byte_in_a_tensor_is_named_with_both_checksums(tmp_path: Path) -> None:
    """The error names file, tensor, expected and found, and says what to do."""
    path = tmp_path / "last.ckpt"
    save(path, {"model": {"weight": torch.full((1000,), 7, dtype=torch.uint8)}})
    path.write_bytes(path.read_bytes().replace(b"\7\7\7", b"\7\10\7", 1))
    text = (
        r"last\.ckpt: tensor 'model\.weight' is not what was written: bytes 0 to 1000, "
        r"xxh3 expected [0-9a-f]{16}, found [0-9a-f]{16}\. Load another checkpoint"
    )
    with pytest.raises(CheckpointCorruptError, match=text):
        load(path)


def test_all_wrong_tensors_are_counted_and_one_named(tmp_path: Path) -> None:
    """Damage in several large tensors, read by several threads, is one error."""
    path = tmp_path / "last.ckpt"
    save(path, {str(number): torch.full((2_000_000,), float(number + 1)) for number in range(6)})
    data = bytearray(path.read_bytes())
    for number in range(3):
        data[int.from_bytes(data[:8], "little") + 8 + number * 16_000_000 + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointCorruptError, match=r"tensor '0' is not .* \(and 2 more\)"):
        load(path)


def test_swapped_tensors_are_found(tmp_path: Path) -> None:
    """Two tensors of one shape whose bytes changed places are corrupt."""
    path = tmp_path / "last.ckpt"
    save(path, {"a": torch.full((64,), 1, dtype=torch.uint8), "b": torch.full((64,), 2, dtype=torch.uint8)})
    a, b = b"\1" * 64, b"\2" * 64
    data = path.read_bytes()
    path.write_bytes(data.replace(a + b, b + a))
    assert path.read_bytes() != data
    with pytest.raises(CheckpointCorruptError, match=r"tensor 'a' is not what was written"):
        load(path)


def test_parts_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    """The head of one file with the tail of another of the same layout is corrupt, wherever they join."""
    one, two, mixed = tmp_path / "one", tmp_path / "two", tmp_path / "mixed"
    for path, value in ((one, 1.0), (two, 2.0)):
        save(path, {"w": torch.full((64,), value), "step": torch.tensor(value)})
    first, second = one.read_bytes(), two.read_bytes()
    assert len(first) == len(second)
    length = 8 + int.from_bytes(first[:8], "little")
    for join in (length + 4, length + 128, length + 260, len(first) - 20):
        mixed.write_bytes(first[:join] + second[join:])
        with pytest.raises(CheckpointCorruptError, match="mixed.* not what was written"):
            load(mixed)


def rewrite_header(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file's header, and make its checksum right again."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length])
    opening = single_file._OPENING_FOUND.match(header)
    assert opening
    blank = header[: opening.start(2)] + b"0" * 16 + header[opening.end(2) :]
    header = header[: opening.start(2)] + xxhash.xxh3_64_hexdigest(blank).encode() + header[opening.end(2) :]
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def test_a_newer_version_says_to_upgrade(tmp_path: Path) -> None:
    """A whole file of a later layout is not called corrupt."""
    path = tmp_path / "last.ckpt"
    save(path, small())
    rewrite_header(path, lambda header: header.replace(b'version":"1"', b'version":"2"'))
    text = r"last\.ckpt was written by a newer plugframe \(format 2, this one reads 1\): upgrade plugframe"
    with pytest.raises(CheckpointError, match=text):
        load(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"shape":[2,3]', b'"shape":[3,2]'),
        (b'"shape":[2,3]', b'"shape":[2,4]'),
        (b'"shape":[2,3]', b'"shape":[2,-3]'),
        (b'"shape":[2,3]', b'"shape":[2,3.0]'),
        (b'"shape":[2,3]', b'"shape":[0,9999999999999999999]'),
        (b'"dtype":"F32","shape":[2,3]', b'"dtype":"I32","shape":[2,3]'),
        (b'"dtype":"F32","shape":[2,3]', b'"dtype":"X","shape":[2,3]'),
        (b'"data_offsets":[0,24]', b'"data_offsets":[4,28]'),
        (b'"data_offsets":[0,24]', b'"data_offsets":0'),
        (b'"model.weight"', b'"model.other"'),
        (b'"__plugframe__.structure"', b'"__plugframe__.sculpture"'),
        (b'"__plugframe__.manifest"', b'"__plugframe__.mischief"'),
        (b'"model.weight":{', b'"model.weight":[{'),
        (b"pt", b"\xff\xff"),
    ],
)
def test_a_forged_header_is_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    """A header whose checksum is right, but which does not fit the manifest or itself, is corrupt."""
    path = tmp_path / "last.ckpt"
    save(path, small())
    rewrite_header(path, lambda header: header.replace(old, new, 1))
    with pytest.raises(CheckpointCorruptError, match="last.ckpt: (tensor|its header)"):
        load(path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    """A folder, a pipe, a plain file and a missing file have different errors, and the closest name is suggested."""
    (tmp_path / "epoch-10.ckpt").write_text("something else entirely")
    os.mkfifo(tmp_path / "pipe")
    cases = {
        tmp_path: r"is a folder, not a checkpoint file: give the file's name\. It holds: epoch-10\.ckpt, pipe\.",
        tmp_path / "epoch10.ckpt": r"epoch10\.ckpt does not exist\. Did you mean 'epoch-10\.ckpt'\?",
        tmp_path / "runs" / "last.ckpt": r"does not exist, nor does the folder .*runs\.",
        tmp_path / "pipe": "is not a regular file",
        tmp_path / "epoch-10.ckpt": r"is not a checkpoint: it begins with b'somethin'",
    }
    for path, text in cases.items():
        with pytest.raises(CheckpointError, match=text):
            load(path)


def test_a_file_that_cannot_be_opened_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the file system is an error of ours, with its reason."""

    def preadv(*args: Any) -> int:
        raise OSError(5, "Input/output error")

    save(tmp_path / "last.ckpt", small())
    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(CheckpointError, match=r"cannot read .*last\.ckpt: Input/output error"):
        load(tmp_path / "last.ckpt")


def test_a_plain_safetensors_file_loads_as_its_tensors(tmp_path: Path) -> None:
    """A file of another tool has no manifest: its tensors come back by name, writable and independent."""
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file(
        {"a.weight": torch.ones(2, 3), "b": torch.zeros(0, dtype=torch.bfloat16)},
        str(path),
        metadata={"by": "__plugframe__"},
    )
    state = load(path)
    path.write_bytes(path.read_bytes()[:-1])
    state["a.weight"].add_(1)
    assert same(state, {"a.weight": torch.full((2, 3), 2.0), "b": torch.zeros(0, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointCorruptError, match="is not a complete safetensors file"):
        load(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointCorruptError, match=r"is truncated: its header has \d+ bytes, found 32"):
        load(path)


def test_pieces_live_until_they_are_summed() -> None:
    """What is handed to the thread stays in memory until its checksum was taken, as late as that may be."""
    alive: list[bool] = []

    class Later:
        """Runs what it was given only when it is waited for."""

        def __init__(self, update: Callable[[memoryview], None], data: memoryview) -> None:
            self.call = lambda: update(data)
            self.piece = pieces[-1]

        def done(self) -> bool:
            return False

        def result(self) -> None:
            alive.append(self.piece() is not None)
            self.call()

    pieces: list[weakref.ref[torch.Tensor]] = []
    checksums = Checksums()
    checksums._pool = SimpleNamespace(submit=Later, shutdown=lambda: None)  # type: ignore[assignment]
    checksums.begin("w")
    for number in range(6):
        piece = torch.full((300_000,), number, dtype=torch.uint8)
        pieces.append(weakref.ref(piece))
        checksums.add("w", piece)
    del piece
    checksums.result()
    assert alive == [True] * 6
