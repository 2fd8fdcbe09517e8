"""The logger: how a run ends, and what MLflow does not take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlflow", reason="MLflow is not installed: pip install mlflow-skinny")

from mlflow import MlflowClient
from plugframe_mlflow.logger import MLflowLogger

from plugframe import Lite, PlugframeWarning

SCRIPT = """
import sys
from plugframe import Lite

for word in ("raise", "leave", "end"):
    lite = Lite(accelerator="cpu", devices=1, loggers="mlflow")
    lite.log_hyperparams({"ends": word})
    lite.log("loss", 1.0)
    try:
        if word == "raise":
            raise ValueError("the boiler has burst")
        if word == "leave":
            raise KeyboardInterrupt
        lite.teardown()
    except (ValueError, KeyboardInterrupt):
        lite.teardown()
lite = Lite(accelerator="cpu", devices=1, loggers="mlflow")
lite.log_hyperparams({"ends": "uncaught"})
lite.log("loss", 1.0)
raise ValueError("the boiler has burst")
"""


def test_a_script_without_a_with_block_is_recorded(tmp_path: Path) -> None:
    """A run that raises has failed, one that is interrupted was killed, and one that ends well has finished."""
    (tmp_path / "train.py").write_text(SCRIPT)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "plugframe.toml").write_text(f'[logger.mlflow]\nuri = "{uri}"\n')
    command = [sys.executable, "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    client = MlflowClient(uri)
    found = client.get_experiment_by_name("plugframe")
    assert found is not None
    runs = client.search_runs([found.experiment_id])
    assert {run.data.params["ends"]: run.info.status for run in runs} == {
        "raise": "FAILED",
        "leave": "KILLED",
        "end": "FINISHED",
        "uncaught": "FAILED",
    }
    assert all(run.data.metrics == {"loss": 1.0} for run in runs)


def test_a_parameter_keeps_its_value(tmp_path: Path) -> None:
    """MLflow refuses a second value of a parameter, which is warned of; the run goes on."""
    logger = MLflowLogger(uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=str(tmp_path / "artifacts"))
    with Lite(accelerator="cpu", devices=1, loggers=logger) as lite:
        lite.log_hyperparams({"lr": 0.5})
        logger.flush()
        lite.log_hyperparams({"lr": 0.25})
        with pytest.warns(PlugframeWarning, match="MLflow does not record lr=0.25: Changing"):
            logger.flush()
        lite.log("loss", 1.0)
    run = MlflowClient(logger.uri).get_run(str(logger.logger_run_id()))
    assert (run.data.params, run.data.metrics, run.info.status) == ({"lr": "0.5"}, {"loss": 1.0}, "FINISHED")
