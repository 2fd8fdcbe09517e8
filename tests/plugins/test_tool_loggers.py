"""The loggers of other tools, recorded locally and read back: how a run ends, what it takes, what a resume records."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import wandb_files
from logger_stores import needs
from plugframe import Lite, MissingDependencyError, PlugframeWarning, SettingError
from plugframe.core.registry.registry import Registry
from plugframe_builtins.mlflow_logger.logger import MLflowLogger
from plugframe_builtins.trackio_logger.logger import TrackioLogger
from plugframe_builtins.wandb_logger.logger import WandbLogger

LOGGERS = {"wandb": WandbLogger, "mlflow": MLflowLogger, "trackio": TrackioLogger}


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_library_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """By name and by class; the name is listed all the same."""
    registry = Registry.discover()
    assert name in registry.names("logger")
    assert registry.describe(registry.find("logger", name)).extra == f"plugframe[{name}]"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'plugframe\[{name}\]'"):
        LOGGERS[name]()


@needs("wandb")
def test_options_are_validated() -> None:
    """A mode that wandb does not have is refused where it is given."""
    with pytest.raises(SettingError, match="mode"):
        Lite(accelerator="cpu", devices=1, loggers=WandbLogger(mode="nowhere"))  # type: ignore[arg-type]


def job(*loggers: Any) -> Lite:
    return Lite(accelerator="cpu", devices=1, loggers=list(loggers))


@needs("wandb")
@pytest.mark.ranks  # it starts a process, wandb-core
def test_wandb_continues_the_run_of_a_checkpoint(tmp_path: Path) -> None:
    """A job that records nothing leaves no run; one that loads a checkpoint records under its id."""

    def logger() -> WandbLogger:
        return WandbLogger(folder=str(tmp_path / "runs"), mode="offline")

    with job(logger()) as lite:
        lite.launch()
    assert not (tmp_path / "runs").exists()
    first, second = logger(), logger()
    with job(first) as lite:
        lite.log("loss", 1.0, step=0)
        with pytest.raises(SettingError, match="global_step"):
            lite.log("global_step", 1.0)
        lite.save(tmp_path / "x", {})
        run_id = str(first.logger_run_id())
    with job(second) as lite:
        lite.load(tmp_path / "x", {})
        lite.log("loss", 0.5, step=1)
    rows = list(wandb_files.history(tmp_path / "runs", run_id))
    assert [(row["global_step"], row["loss"]) for row in rows] == [(0, 1.0), (1, 0.5)]


ENDS = """
import os, sys
from plugframe import Lite

lite = Lite(accelerator="cpu", devices=1, loggers=sys.argv[1])
lite.log("loss", 1.0)
if "raise" in sys.argv:
    raise ValueError("the boiler has burst")
sys.exit(3 if "leave" in sys.argv else 0)
"""


@needs("wandb")
@pytest.mark.ranks
@pytest.mark.parametrize(("word", "failed"), [("raise", True), ("leave", True), ("end", False)])
def test_wandb_records_the_end_of_a_script_without_a_with_block(tmp_path: Path, word: str, failed: bool) -> None:
    """A script that raises or leaves with an exit code is a failed run, one that ends well is not."""
    (tmp_path / "plugframe.toml").write_text('[logger.wandb]\nmode = "offline"\n')
    done = script(tmp_path, "wandb", word)
    assert bool(done.returncode) == failed, done.stderr
    (file,) = (tmp_path / "runs/wandb").glob("offline-run-*/run-*.wandb")
    run_id = file.stem.removeprefix("run-")
    assert (wandb_files.exit_code(tmp_path / "runs", run_id) != 0) == failed, done.stderr
    assert [row["loss"] for row in wandb_files.history(tmp_path / "runs", run_id)] == [1.0]


def script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(ENDS)
    return subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "TRACKIO_DIR": str(folder / "trackio")},
    )


@needs("mlflow")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow 3.17 uses what SQLAlchemy 2.1 deprecates
def test_mlflow_keeps_parameters_and_says_how_a_run_ended(tmp_path: Path) -> None:
    """MLflow refuses a second value of a parameter, which is warned of; statuses differ by how runs end."""
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    statuses = []
    for error in (None, ValueError("the boiler has burst"), KeyboardInterrupt()):
        logger = MLflowLogger(uri=uri, artifacts=str(tmp_path / "artifacts"), run_name="first")
        lite = job(logger)
        lite.log_hyperparams({"lr": 0.5})
        lite.log("loss", 1.0)
        if error is None:
            logger.flush()
            lite.log_hyperparams({"lr": 0.25})
            with pytest.warns(PlugframeWarning, match="MLflow does not record lr=0.25: Changing"):
                logger.flush()
        lite.teardown(error)
        run = mlflow.MlflowClient(uri).get_run(str(logger.logger_run_id()))
        assert (run.data.params, run.data.metrics, run.info.run_name) == ({"lr": "0.5"}, {"loss": 1.0}, "first")
        statuses.append(run.info.status)
    assert statuses == ["FINISHED", "FAILED", "KILLED"]


@needs("trackio")
@pytest.mark.ranks
def test_trackio_records_the_end_of_a_script_without_a_with_block(tmp_path: Path) -> None:
    """A script that raises is a failed run: an alert says of what. What it prints stays its own."""
    done = script(tmp_path, "trackio", "raise")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; r = S.get_runs('plugframe')[0];"
        "print(json.dumps([[x['loss'] for x in S.get_logs('plugframe', r)], [a['text'] for a in "
        "S.get_alerts('plugframe', r)]]))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(read.stdout) == [[1.0], ["ValueError: the boiler has burst"]]


@needs("trackio")
@needs("mlflow")
@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_several_at_once(tmp_path: Path) -> None:
    """One call reaches csv, MLflow and Trackio."""
    code = f"""
from plugframe import Lite
from plugframe_builtins.mlflow_logger.logger import MLflowLogger
with Lite(accelerator="cpu", devices=1, loggers=["csv", MLflowLogger(uri="sqlite:///{tmp_path}/m.db"), "trackio"]) as l:
    l.log("loss", 2.5, step=3)
    ids = [each.logger_run_id() for each in l.loggers]
from mlflow import MlflowClient
from trackio.sqlite_storage import SQLiteStorage
assert MlflowClient("sqlite:///{tmp_path}/m.db").get_run(ids[1]).data.metrics == {{"loss": 2.5}}
assert [(row["step"], row["loss"]) for row in SQLiteStorage.get_logs("plugframe", ids[2])] == [(3, 2.5)]
print(open("runs/version_0/metrics.csv").read().split())
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout == "['step,loss', '3,2.5']\n", done.stderr
