"""Logger objects of Fabric and Lightning are taken as they are."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from plugframe import Lite, PlugframeWarning, SettingError


class CSVLogger:
    """As Fabric has it: an abstract interface of a few methods, and `experiment`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows, self.params, self.status = folder, [], {}, ""
        self.num_saved = 0

    @property
    def experiment(self) -> list[Any]:
        return self.rows

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))

    def log_hyperparams(self, params: dict[str, Any] | argparse.Namespace, *args: Any) -> None:
        self.params.update(params if isinstance(params, dict) else vars(params))

    def save(self) -> None:
        self.num_saved += 1

    def finalize(self, status: str) -> None:
        self.status = status
        (self.folder / "rows.json").write_text(json.dumps(self.rows))


class Bare:
    """The least that is taken."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))


def job(*loggers: Any) -> Lite:
    return Lite(accelerator="cpu", devices=1, loggers=list(loggers))


def test_its_methods_are_called_beside_a_logger_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics as numbers with a step, flat hyperparameters, save and finalize; `lite.loggers` has the object itself."""
    monkeypatch.chdir(tmp_path)
    own = CSVLogger(tmp_path)
    with job(own, "csv") as lite:
        lite.log("loss", 0.5)
        lite.log_dict({"loss": 0.25, "accuracy": 1}, step=7)
        lite.log_hyperparams({"model": {"layers": 2}, "lr": 0.1})
        assert lite.loggers[0] is own
        assert lite.logger is own
        assert lite.loggers[0].experiment is own.rows  # type: ignore[attr-defined]
        assert "CSVLogger" in lite.plan.line()
    assert own.rows == [(0, {"loss": 0.5}), (7, {"loss": 0.25, "accuracy": 1.0})]
    assert (own.params, own.num_saved, own.status) == ({"model/layers": 2, "lr": 0.1}, 1, "success")
    assert json.loads((tmp_path / "rows.json").read_text())[1] == [7, {"loss": 0.25, "accuracy": 1.0}]
    assert (tmp_path / "runs/version_0/metrics.csv").exists()


def fails(*loggers: Any) -> None:
    with job(*loggers) as lite:
        lite.log("loss", 1.0)
        lite.log_hyperparams({"lr": 0.1})
        if isinstance(loggers[0], Bare):
            lite.log_artifact("notes", "some text\n")
        raise ValueError("the boiler has burst")


def test_a_failed_run_is_finalized_as_failed(tmp_path: Path) -> None:
    """The word is the one that Lightning passes."""
    own = CSVLogger(tmp_path)
    with pytest.raises(ValueError, match="boiler"):
        fails(own)
    assert own.status == "failed"


def test_what_it_does_not_have_is_told_by_name() -> None:
    """Hyperparameters, artifacts, the failure of a run: one warning each."""
    bare = Bare()
    with pytest.warns(PlugframeWarning) as warned, pytest.raises(ValueError, match="boiler"):
        fails(bare)
    texts = " ".join(str(each.message) for each in warned)
    for part in (
        "Bare does not store hyperparameters",
        "Bare does not store texts",
        "Bare does not record that the run",
    ):
        assert part in texts
    assert bare.rows == [(0, {"loss": 1.0})]


class NoMetrics:
    def log_hyperparams(self, params: Any) -> None: ...


class OtherArguments:
    def log_metrics(self, values: Any) -> None: ...


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (NoMetrics, r"loggers=NoMetrics: it has log_hyperparams\(\), and no log_metrics\(metrics, step\)"),
        (OtherArguments, r"loggers=OtherArguments: its log_metrics\(\) is called as"),
        (object, "neither the name of a plugin nor a logger object"),
    ],
)
def test_an_object_that_lacks_what_it_needs_is_refused(made: type, message: str) -> None:
    """Where `Lite` is built, by its name."""
    with pytest.raises(SettingError, match=message):
        job(made())


def test_it_travels_to_another_process_and_counts_on_after_a_resume(tmp_path: Path) -> None:
    """A job that is pickled has the object; calls without a step go on where the checkpoint was."""
    first, second = Bare(), Bare()
    assert pickle.loads(pickle.dumps(job(first))).plan.loggers
    with job(first) as lite:
        lite.log("loss", 1.0)
        lite.save(tmp_path / "x", {})
    with job(second) as lite:
        lite.load(tmp_path / "x", {})
        lite.log("loss", 0.5)
    assert second.rows == [(1, {"loss": 0.5})]
