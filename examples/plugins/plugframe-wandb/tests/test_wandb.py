"""The logger: how a run ends, and what a resumed job records."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")

import offline
from plugframe_wandb.logger import WandbLogger

from plugframe import Lite, SettingError

SCRIPT = """
import sys
from plugframe import Lite

lite = Lite(accelerator="cpu", devices=1, loggers="wandb")
lite.log("loss", 1.0)
if "raise" in sys.argv:
    raise ValueError("the boiler has burst")
sys.exit(3 if "leave" in sys.argv else 0)
"""


@pytest.mark.parametrize(("word", "failed"), [("raise", True), ("leave", True), ("end", False)])
def test_a_script_without_a_with_block_is_recorded(tmp_path: Path, word: str, failed: bool) -> None:
    """A script that raises or leaves with an exit code is a failed run, one that ends well is not."""
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "plugframe.toml").write_text('[logger.wandb]\nmode = "offline"\n')
    done = subprocess.run(
        [sys.executable, "train.py", word], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert bool(done.returncode) == failed, done.stderr
    (file,) = (tmp_path / "runs/wandb").glob("offline-run-*/run-*.wandb")
    run_id = file.stem.removeprefix("run-")
    assert (offline.exit_code(tmp_path / "runs", run_id) != 0) == failed, done.stderr
    assert [row["loss"] for row in offline.history(tmp_path / "runs", run_id)] == [1.0]


def test_the_column_of_steps_is_taken(tmp_path: Path) -> None:
    """A metric with the name of wandb's step axis is refused."""
    logger = WandbLogger(folder=str(tmp_path), mode="offline")
    with Lite(accelerator="cpu", devices=1, loggers=logger) as lite, pytest.raises(SettingError, match="global_step"):
        lite.log("global_step", 1.0)


def test_nothing_begins_before_the_first_record(tmp_path: Path) -> None:
    """A job that records nothing leaves no run, so that a checkpoint can name the run to continue."""
    logger = WandbLogger(folder=str(tmp_path / "runs"), mode="offline")
    with Lite(accelerator="cpu", devices=1, loggers=logger) as lite:
        lite.launch()
    assert not (tmp_path / "runs").exists()
