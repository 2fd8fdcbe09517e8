"""``plugframe checkpoint``: show, verify and convert checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from checkpoint_trees import same
from plugframe.cli import cli
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins.dcp_checkpoint.checkpoint import ShardedCheckpoint
from plugframe_builtins.safetensors_checkpoint.checkpoint import SafetensorsCheckpoint
from plugframe_builtins.single.one_rank import OneRank
from ranks import hooks_of


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def plug(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run ``plugframe checkpoint …`` in this process."""

    def run(*words: object) -> Result:
        with pytest.raises(SystemExit) as ended:
            cli.main(["checkpoint", *map(str, words)])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, out, err)

    return run


def made(plugin: Any) -> Any:
    """A plugin, set up for one rank."""
    plugin.checkpoint_setup(
        context=Context(world=World(), device=torch.device("cpu"), hooks=hooks_of(OneRank()), names={})
    )
    return plugin


STATE = {
    "model": {
        "w": torch.arange(12.0).view(3, 4),
        "b": torch.ones(2, dtype=torch.bfloat16),
        "c": torch.zeros(2).cfloat(),
    },
    "head": {"w": torch.arange(4.0), "note": "bare"},
    "epoch": 3,
    "loss": float("nan"),
    "lists": [1, [2, 3]],
    "nested": [{"t": torch.tensor(1), "lr": 0.1}],
    "__plugframe__": {"rng": [list(range(600))]},
}
INFO = {"plugframe": "0.1.0", "world_size": 4, "plugins": {"strategy": "strategy 'x' (acme 1)", "p": "q"}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the same state in both forms, and the same weights from other tools."""
    made(ShardedCheckpoint()).checkpoint_save(path=str(tmp_path / "folder"), state=STATE, info=INFO, wait=True)
    made(SafetensorsCheckpoint()).checkpoint_save(path=str(tmp_path / "file"), state=STATE, info=INFO, wait=True)
    save_file({"w": torch.ones(2)}, tmp_path / "plain")
    torch.save({"w": torch.ones(2)}, tmp_path / "torch.pt")
    return tmp_path


def load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = made(ShardedCheckpoint()).checkpoint_load(path=str(path), trusted=False, lazy=False)
    return state


@pytest.mark.parametrize("form", ["folder", "file"])
def test_inspect_says_what_is_in_a_checkpoint(saved: Path, plug: Callable[..., Result], form: str) -> None:
    """Format, size, ranks, plugins, a table of tensors, plain values; not the lists of random numbers."""
    result = plug("inspect", saved / form)
    assert result.code == 0
    assert "ranks      4\n" in result.out
    assert "plugins    strategy 'x' (acme 1); q\n" in result.out
    assert "resumes    exactly\n" in result.out
    assert "tensors    5, 92 bytes\n" in result.out
    assert "model.w     float32    3×4    48\n" in result.out
    assert "nested.0.t  int64      ()     8\n" in result.out
    for line in (
        "epoch        3",
        "loss         nan",
        "lists        [1, [2, 3]]",
        "nested.0.lr  0.1",
        "head.note    'bare'",
    ):
        assert f"{line}\n" in result.out
    assert "599" not in result.out


def test_inspect_as_json(saved: Path, plug: Callable[..., Result]) -> None:
    """The same as an object, for scripts."""
    found = json.loads(plug("inspect", saved / "folder", "--json").out)
    assert found["format"] == "plugframe sharded"
    assert (found["version"], found["files"], found["resumes_exactly"]) == (1, 2, True)
    assert found["info"] == INFO
    assert {"name": "model.b", "dtype": "bfloat16", "shape": [2], "bytes": 4} in found["tensors"]
    values = {"head.note": "bare", "epoch": 3, "loss": "nan", "lists": [1, [2, 3]], "nested.0.lr": 0.1}
    assert found["values"] == values
    assert json.loads(plug("inspect", saved / "plain", "--json").out)["version"] == 0


@pytest.mark.parametrize("form", ["folder", "file"])
def test_verify_reads_every_byte(saved: Path, plug: Callable[..., Result], form: str) -> None:
    """Verify reports an intact checkpoint, and names the file and the tensor of a damaged one, with exit code 1."""
    result = plug("verify", saved / form)
    assert result == Result(0, f"{saved / form} is intact: every byte matches what was written.\n", "")
    path = saved / "file" if form == "file" else next((saved / "folder").glob("*.safetensors"))
    data = path.read_bytes()
    at = data.index(torch.arange(12.0).numpy().tobytes())
    path.write_bytes(data[: at + 7] + bytes([data[at + 7] ^ 1]) + data[at + 8 :])
    result = plug("verify", saved / form)
    assert (result.code, result.out) == (1, "")
    assert f"{path}: tensor 'model.w' is not what was written: bytes 0 to 48, xxh3 expected " in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["plain", "torch.pt"])
def test_verify_claims_no_more_than_it_knows(saved: Path, plug: Callable[..., Result], name: str) -> None:
    """A file of another tool has no checksums."""
    assert plug("verify", saved / name).out.endswith("has no checksums: changed values cannot be detected.\n")


def test_convert_there_and_back(saved: Path, plug: Callable[..., Result]) -> None:
    """One file of a folder and a folder of one file, the same to the last bit, with what is known of the run."""
    there = plug("convert", saved / "folder", saved / "new.ckpt")
    assert there == Result(0, f"{saved / 'new.ckpt'} is written.\n", "")
    assert plug("convert", saved / "new.ckpt", saved / "back").code == 0
    assert plug("convert", saved / "back", saved / "copy", "--to=dcp").code == 0
    for name in ("new.ckpt", "back", "copy"):
        assert same(load(saved / name), load(saved / "folder"))
        assert json.loads(plug("inspect", saved / name, "--json").out)["info"] == INFO
    assert (saved / "new.ckpt").is_file()
    assert (saved / "back" / "manifest.json").is_file()
    assert plug("convert", saved / "torch.pt", saved / "converted").code == 0
    assert same(load(saved / "converted"), {"w": torch.ones(2)})


def test_convert_to_bare_weights(saved: Path, plug: Callable[..., Result]) -> None:
    """A state_dict alone, as other tools want it; what is no tensor is left out, and said."""
    result = plug("convert", saved / "folder", saved / "head.safetensors", "--weights=head")
    assert (result.code, result.err) == (0, "left out, since the file holds tensors only: note\n")
    assert same(load_file(saved / "head.safetensors"), {"w": torch.arange(4.0)})
    for key, text in (
        ("hed", "--weights=hed is not in the checkpoint. Did you mean 'head'? It holds: model, head, epoch"),
        ("epoch", "--weights=epoch names a int, not a state_dict"),
        ("model", "'c' is of torch.complex64, which the format cannot hold"),
    ):
        result = plug("convert", saved / "folder", saved / "bad", f"--weights={key}")
        assert result.code in (1, 2)
        assert text in result.err
        assert not (saved / "bad").exists()


def test_convert_overwrites_only_if_told(saved: Path, plug: Callable[..., Result]) -> None:
    """What is at DST stays, unless --force is given; SRC itself is never overwritten."""
    result = plug("convert", saved / "plain", saved / "folder")
    assert result.code == 2
    assert "folder is there already: give another DST, or add --force." in result.err
    assert plug("convert", saved / "plain", saved / "folder", "--force").code == 0
    assert same(load(saved / "folder"), {"w": torch.ones(2)})
    assert "SRC and DST are both" in plug("convert", saved / "file", saved / "file", "--force").err
    result = plug("convert", saved / "plain", saved / "new", "--to=dcb")
    assert result.code == 2
    assert "Did you mean 'dcp'?" in result.err


def test_a_folder_of_torch_is_converted(saved: Path, plug: Callable[..., Result]) -> None:
    """It is read without running code, and has no checksums to verify."""
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": {"w": torch.arange(5.0)}}, checkpoint_id=saved / "theirs")
    inspected, verified = plug("inspect", saved / "theirs"), plug("verify", saved / "theirs")
    assert (inspected.code, verified.code) == (1, 0)
    assert "which is not read lazily: load it, and save it again" in inspected.err
    assert "its format has no checksums" in verified.out
    assert plug("convert", saved / "theirs", saved / "x", "--to=safetensors").code == 0
    assert same(load(saved / "x"), {"model": {"w": torch.arange(5.0)}})


def test_what_is_none_is_one_line(saved: Path, plug: Callable[..., Result]) -> None:
    """A path that is missing, or no checkpoint, is one line with exit code 1."""
    (saved / "text").write_text("a long text which is no checkpoint")
    (saved / "empty").mkdir()
    for name, text in (
        ("foldr", "foldr does not exist. Did you mean 'folder'?"),
        ("text", "text is not a checkpoint: it begins with b'a long t'"),
        ("empty", "empty is not complete: it is an empty folder."),
    ):
        for command in ("inspect", "verify"):
            result = plug(command, saved / name)
            assert result.code == 1
            assert text in result.err
            assert len(result.err.splitlines()) == 1


def test_as_a_process(saved: Path) -> None:
    """The command works from a shell, and needs no job."""
    argv = [sys.executable, "-m", "plugframe", "checkpoint", "verify", str(saved / "folder")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{saved / 'folder'} is intact: every byte matches what was written.\n"
