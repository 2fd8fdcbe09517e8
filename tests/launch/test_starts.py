"""The main example has the losses of one process for every way to start it (law 6)."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from pathlib import Path

import pytest

import warm
from paths import EXAMPLES

pytest.importorskip("sklearn")

SCRIPT = EXAMPLES / "image_classifier" / "train_lite.py"
TORCHRUN = Path(sysconfig.get_path("scripts")) / "torchrun"
OPTIONS = ("--epochs", "1", "--losses", "losses.jsonl", "--plot", "losses.png")

#: Calls the example's main() in processes that ``launch(fn)`` spawns.
BY_FUNCTION = f"""
import argparse, sys
from pathlib import Path
from plugframe import Lite

def on_rank(lite, options):
    sys.path.insert(0, {str(SCRIPT.parent)!r})
    import train_lite
    train_lite.main(options)
    return lite.global_rank, lite.world_size

if __name__ == "__main__":
    options = argparse.Namespace(
        epochs=1, batch_size=32, lr=0.08, seed=0, checkpoint=None, losses=Path("losses.jsonl"), plot=None
    )
    lite = Lite(accelerator="cpu", strategy="ddp", devices=2, launcher="spawn")
    print("rank 0 returned", lite.launch(on_rank, options))
"""


def start(folder: Path, *command: str, **variables: str) -> tuple[list[float], str]:
    """Run a command in `folder`; return the losses the example wrote, and the output."""
    folder.mkdir()
    (folder / "by_function.py").write_text(BY_FUNCTION)
    done = warm.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (folder / "losses.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], done.stdout


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("one") / "run"
    losses, _ = start(folder, sys.executable, str(SCRIPT), *OPTIONS)
    assert len(losses) == 45
    return losses


def test_plugframe_run_has_the_losses_of_one_process(tmp_path: Path, one_process: list[float]) -> None:
    """``plugframe run`` on two ranks."""
    run = (sys.executable, "-m", "plugframe", "run", str(SCRIPT), "--strategy=ddp", "--devices=2", "--accelerator=cpu")
    losses, _ = start(tmp_path / "run", *run, *OPTIONS)
    assert losses == pytest.approx(one_process, abs=1e-5)


def test_launch_in_a_script_has_the_losses_of_one_process(tmp_path: Path, one_process: list[float]) -> None:
    """``python`` and ``lite.launch()`` on two ranks."""
    variables = {"PLUGFRAME_DEVICES": "2", "PLUGFRAME_STRATEGY": "ddp"}
    losses, printed = start(tmp_path / "run", sys.executable, str(SCRIPT), *OPTIONS, **variables)
    assert losses == pytest.approx(one_process, abs=1e-5)
    assert printed.count("test accuracy:") == 1


def test_torchrun_has_the_losses_of_one_process(tmp_path: Path, one_process: list[float]) -> None:
    """``torchrun`` with two processes; plugframe launches nothing."""
    command = (str(TORCHRUN), "--standalone", "--nproc-per-node=2", str(SCRIPT))
    # torchrun leaves a folder in the temporary one for ever.
    losses, _ = start(tmp_path / "run", *command, *OPTIONS, TMPDIR=str(tmp_path))
    assert losses == pytest.approx(one_process, abs=1e-5)


def test_launch_of_a_function_has_the_losses_of_one_process(tmp_path: Path, one_process: list[float]) -> None:
    """``launch(fn)`` with two spawned processes; rank 0's result is returned."""
    losses, printed = start(tmp_path / "run", sys.executable, "by_function.py")
    assert losses == pytest.approx(one_process, abs=1e-5)
    assert "rank 0 returned (0, 2)" in printed
