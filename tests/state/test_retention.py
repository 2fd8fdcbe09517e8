"""The checkpoint manager: when it saves, which checkpoints remain, and where it resumes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plugframe import CheckpointError, CheckpointMismatchError, Lite, PlugframeWarning, SettingError
from plugframe.checkpoint import open_locked
from plugframe.hooks.world import World
from ranks import run_ranks


@pytest.fixture(params=["safetensors", "dcp"])
def lite(request: pytest.FixtureRequest) -> Iterator[Lite]:
    with Lite(accelerator="cpu", devices=1, checkpoint=request.param) as made:
        yield made


def state(value: float = 0.0) -> dict[str, Any]:
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, value)
    return {"model": model, "note": "x"}


def steps(folder: Path) -> list[int]:
    return sorted(int(name[5:17]) for name in os.listdir(folder) if name.startswith("step-"))


@pytest.mark.parametrize("wait", [True, False])
def test_the_newest_and_the_best_are_kept(lite: Lite, tmp_path: Path, wait: bool) -> None:
    """keep_last and keep_best each keep theirs; all others are removed completely."""
    if not wait and lite.plan.choices["checkpoint"].name != "dcp":
        pytest.skip("this format does not save in the background")
    kept = lite.checkpoints(tmp_path / "a", keep_last=2, keep_best=("loss", "min", 1))
    assert kept.latest() is None
    assert kept.best() is None
    for step, loss in enumerate([5.0, 1.0, 4.0, float("nan"), 3.0]):
        assert kept.save(step, state(loss), {"loss": loss}, wait=wait)
    assert kept.save(9, state(9.0), wait=True)
    assert steps(tmp_path / "a") == [1, 4, 9]
    assert kept.latest() == str(tmp_path / "a" / "step-000000000009.ckpt")
    assert kept.best() == str(tmp_path / "a" / "step-000000000001.ckpt")
    assert len(os.listdir(tmp_path / "a")) == 3
    most = lite.checkpoints(tmp_path / "b", keep_last=1, keep_best=("loss", "max", 2))
    for step, loss in enumerate([5.0, 1.0, 4.0, 3.0, 2.0]):
        most.save(step, state(loss), {"loss": loss})
    assert steps(tmp_path / "b") == [0, 2, 4]
    everything = lite.checkpoints(tmp_path / "c", keep_last=None)
    for step in range(5):
        everything.save(step, state())
    assert steps(tmp_path / "c") == [0, 1, 2, 3, 4]


def test_a_run_goes_on_from_the_newest_whole_one(lite: Lite, tmp_path: Path) -> None:
    """A damaged checkpoint is renamed with a warning; one that does not match raises."""
    kept = lite.checkpoints(tmp_path / "run", keep_last=None)
    assert not kept.resume(state())
    assert kept.step == 0
    for step in (1, 2, 3):
        kept.save(step, state(float(step)))
    newest = tmp_path / "run" / "step-000000000003.ckpt"
    damaged = newest if newest.is_file() else next(newest.glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    again, found = lite.checkpoints(tmp_path / "run"), state()
    with pytest.warns(
        PlugframeWarning,
        match=r"step-000000000003.ckpt.* It is renamed to damaged-step-.*, and the checkpoint before it",
    ):
        assert again.resume(found)
    assert again.step == 2
    assert found["model"].weight.tolist() == [[2.0, 2.0]]
    assert steps(tmp_path / "run") == [1, 2]
    assert (tmp_path / "run" / "damaged-step-000000000003.ckpt").exists()
    with pytest.raises(CheckpointMismatchError, match="does not fit"):
        again.resume({"model": nn.Linear(3, 1), "note": ""})
    assert steps(tmp_path / "run") == [1, 2]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(lite: Lite, tmp_path: Path) -> None:
    """Starting over could be mistaken for resuming: it raises."""
    kept = lite.checkpoints(tmp_path / "run")
    kept.save(1, state())
    path = tmp_path / "run" / "step-000000000001.ckpt"
    damaged = path if path.is_file() else path / "manifest.json"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    with (
        pytest.warns(PlugframeWarning, match="It is renamed to damaged-step-"),
        pytest.raises(
            CheckpointError, match="All 1 checkpoints in .* are damaged and renamed to damaged-…: remove them to"
        ),
    ):
        kept.resume(state())


def interrupted(path: Path) -> None:
    """Leave the files of a save that is killed at its end."""
    if path.is_file():
        path.rename(path.with_name(f".{path.name}.tmp-{'0' * 16}"))
    else:
        (path / "manifest.json").rename(path / f".manifest.json.tmp-{'0' * 16}")


@pytest.mark.parametrize("steps_before", [[], [1, 2]])
def test_what_a_killed_save_left_is_no_checkpoint(lite: Lite, tmp_path: Path, steps_before: list[int]) -> None:
    """A run resumes from the checkpoint before, or starts over; the next save removes leftovers."""
    kept = lite.checkpoints(tmp_path / "run")
    for step in (*steps_before, 7):
        kept.save(step, state(float(step)))
    newest = tmp_path / "run" / f"step-{7:012d}.ckpt"
    folder = newest.is_dir()
    interrupted(newest)
    again, found = lite.checkpoints(tmp_path / "run"), state()
    removed = pytest.warns(
        PlugframeWarning, match="7.ckpt is not complete.* It is removed, and the checkpoint before it is loaded"
    )
    with removed if folder else nullcontext():
        assert again.resume(found) is bool(steps_before)
    assert again.step == max(steps_before, default=0)
    again.save(8, state())
    assert sorted(os.listdir(tmp_path / "run")) == [f"step-{step:012d}.ckpt" for step in (*steps_before, 8)]


def test_a_save_that_only_made_a_folder_left_nothing(lite: Lite, tmp_path: Path) -> None:
    """An empty folder is neither a checkpoint nor a damaged one."""
    (tmp_path / "run" / f"step-{1:012d}.ckpt").mkdir(parents=True)
    with pytest.warns(PlugframeWarning, match="is not complete: it is an empty folder.* It is removed"):
        assert not lite.checkpoints(tmp_path / "run").resume(state())
    assert os.listdir(tmp_path / "run") == []


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(lite: Lite, tmp_path: Path) -> None:
    """Temporary files of dead writers of any step are removed; other files are not."""
    dead = [tmp_path / f".step-{step:012d}.ckpt.tmp-{step:016x}" for step in (1, 2)]
    dead[0].write_bytes(b"half")
    dead[1].mkdir()
    (dead[1] / "manifest.json").write_bytes(b"half")
    (tmp_path / ".notes.tmp-0000000000000000").write_bytes(b"mine")
    living = tmp_path / f".step-{3:012d}.ckpt.tmp-{3:016x}"
    file = open_locked(str(living))
    assert file is not None
    with file:
        lite.checkpoints(tmp_path).save(4, state())
    there = [".notes.tmp-0000000000000000", living.name, f"step-{4:012d}.ckpt"]
    assert sorted(os.listdir(tmp_path)) == there


def test_time_decides(lite: Lite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """every_s limits the rate of saves; force ignores it."""
    now = [100.0]
    monkeypatch.setattr("plugframe.state.manager.time.monotonic", lambda: now[0])
    kept = lite.checkpoints(tmp_path / "run", keep_last=None, every_s=60)
    assert kept.save(1, state())
    now[0] += 59
    assert not kept.save(2, state())
    assert kept.save(3, state(), force=True)
    now[0] += 59
    assert not kept.save(4, state())
    now[0] += 1
    assert kept.save(5, state())
    assert steps(tmp_path / "run") == [1, 3, 5]


def _ranks_agree(world: World, folder: str) -> list[Any]:
    with Lite(accelerator="cpu", devices=world.world_size) as lite:
        kept = lite.checkpoints(folder, keep_last=1, keep_best=("loss", "min", 1), every_s=1000)
        model = lite.setup(nn.Linear(2, 1))
        saved = [kept.save(step, {"model": model}, {"loss": loss}) for step, loss in enumerate([2.0, 1.0])]
        saved.append(kept.save(5, {"model": model}, {"loss": 3.0}, force=True))
        lite.barrier()
        fresh = lite.checkpoints(folder)
        return [*saved, kept.latest(), kept.best(), fresh.resume({"model": model}), fresh.step]


def test_ranks_agree(tmp_path: Path) -> None:
    """All ranks save in the same calls and see the same checkpoints."""
    first, second = run_ranks(2, _ranks_agree, str(tmp_path))
    assert first == second
    assert first[:3] == [True, False, True]
    assert first[5:] == [True, 5]
    assert torch.tensor(first[5]).item()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_last": 0}, "keep_last=0 must be an integer of at least 1"),
        ({"every_s": -1}, "every_s=-1 must be a number of seconds above 0"),
        ({"keep_best": ("loss", "least", 1)}, "keep_best=.* must be .metric, 'min' or 'max', number to keep"),
        ({"keep_best": "loss"}, "must be .metric"),
    ],
)
def test_wrong_settings_are_refused(lite: Lite, settings: dict[str, Any], message: str) -> None:
    """Each error has the allowed values."""
    with pytest.raises(SettingError, match=message):
        lite.checkpoints("x", **settings)


def test_wrong_calls_are_refused(lite: Lite, tmp_path: Path) -> None:
    """Steps are integers; metrics contain the compared one; best() needs keep_best."""
    with pytest.raises(
        CheckpointError, match="s3://a/b is a URL: this checkpoint format keeps to paths of the file sys"
    ):
        lite.checkpoints("s3://a/b").resume(state())
    kept = lite.checkpoints(tmp_path / "run", keep_best=("loss", "min", 1))
    with pytest.raises(SettingError, match="step=1.5 of a checkpoint must be an integer"):
        kept.save(1.5, state())  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="keep_best compares 'loss', and metrics= has 'acc'"):
        kept.save(1, state(), {"acc": 1.0})
    with pytest.raises(SettingError, match=r"best\(\) needs keep_best="):
        lite.checkpoints(tmp_path / "run").best()
