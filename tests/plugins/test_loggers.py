"""The built-in loggers: what ends up in the files, and where they lie."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from plugframe import Lite, MissingDependencyError, PlugframeWarning, SettingError
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins import csv_logger, tensorboard_logger
from plugframe_builtins.csv_logger.logger import CSVLogger
from plugframe_builtins.tensorboard_logger.logger import TensorBoardLogger


def context_of(rank: int = 0, world_size: int = 1) -> Context:
    world = World(global_rank=rank, local_rank=rank, world_size=world_size, local_world_size=world_size)
    return Context(world=world, device=torch.device("cpu"), hooks=SimpleNamespace(), names={})


def ready(folder: Path, **options: int) -> CSVLogger:
    logger = CSVLogger(folder, **options)
    logger.logger_setup(context_of())
    return logger


def rows_of(logger: CSVLogger) -> list[dict[str, str]]:
    assert logger.path is not None
    with open(logger.path, newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_row_for_each_step_and_a_column_for_each_metric(tmp_path: Path) -> None:
    """What is logged for one step is one row; a metric that comes later is a new column, empty before."""
    logger = ready(tmp_path / "runs")
    logger.logger_log({"loss": 0.5}, 1)
    logger.logger_log({"accuracy": 0.25}, 1)
    logger.logger_log({"loss": 0.1}, 2)
    logger.logger_log({"loss": 0.2, "time": 3.0}, 2)
    logger.logger_teardown()
    assert logger.path == tmp_path / "runs" / "version_0" / "metrics.csv"
    assert rows_of(logger) == [
        {"step": "1", "loss": "0.5", "accuracy": "0.25", "time": ""},
        {"step": "2", "loss": "0.2", "accuracy": "", "time": "3.0"},
    ]


def test_csv_counts_calls_where_no_step_is_given(tmp_path: Path) -> None:
    """Without a step each call is a row, numbered from 0."""
    logger = ready(tmp_path)
    for value in (1.0, 2.0):
        logger.logger_log({"loss": value}, None)
    logger.logger_teardown()
    assert [(row["step"], row["loss"]) for row in rows_of(logger)] == [("0", "1.0"), ("1", "2.0")]


def test_csv_values_are_exact(tmp_path: Path) -> None:
    """Every float is read back as it was, infinities and NaN included, also after the file was written anew."""
    values = [0.1 + 0.2, 1e-300, math.inf, -math.inf, math.nan, 5e-324]
    logger = ready(tmp_path, flush_rows=1)
    for step, value in enumerate(values):
        logger.logger_log({"value": value}, step)
    logger.logger_log({"another": 1.0}, 0)
    logger.logger_teardown()
    read = [float(row["value"]) for row in rows_of(logger)]
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(read, values, strict=True))
    assert rows_of(logger)[0]["another"] == "1.0"


def test_csv_is_written_every_few_rows(tmp_path: Path) -> None:
    """Whole rows reach the file while the run goes on; the row of the current step waits, since it may grow."""
    logger = ready(tmp_path, flush_rows=2)
    assert logger.path is not None
    for step in range(5):
        logger.logger_log({"loss": float(step)}, step)
        if step < 2:
            assert not logger.path.exists()
    assert [row["step"] for row in rows_of(logger)] == ["0", "1", "2", "3"]
    logger.logger_log({"loss": 9.0}, 4)
    logger.logger_teardown()
    assert [row["loss"] for row in rows_of(logger)] == ["0.0", "1.0", "2.0", "3.0", "9.0"]
    assert sorted(path.name for path in logger.path.parent.iterdir()) == ["metrics.csv", "run.json"]


def test_csv_takes_more_of_a_step_that_is_written(tmp_path: Path) -> None:
    """A metric of an earlier step goes into that step's row, wherever it is."""
    logger = ready(tmp_path, flush_rows=1)
    for step in range(4):
        logger.logger_log({"loss": float(step)}, step)
    logger.logger_log({"validation": 7.0}, 1)
    logger.logger_log({"loss": 4.0}, 4)
    logger.logger_teardown()
    rows = rows_of(logger)
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row["validation"] for row in rows] == ["", "7.0", "", "", ""]


def test_csv_names_with_commas_and_quotes(tmp_path: Path) -> None:
    """A metric may have any name but that of the step's column."""
    logger = ready(tmp_path)
    logger.logger_log({'loss, "total"': 1.0}, 0)
    with pytest.raises(SettingError, match="the column 'step' holds the step's number; choose another name"):
        logger.logger_log({"step": 1.0}, 0)
    logger.logger_teardown()
    assert rows_of(logger) == [{"step": "0", 'loss, "total"': "1.0"}]


def test_an_earlier_run_is_never_overwritten(tmp_path: Path) -> None:
    """Every run gets a folder of its own, numbered above all there are; so does one object used twice."""
    (tmp_path / "version_7").mkdir()
    (tmp_path / "version_x").mkdir()
    first = ready(tmp_path)
    first.logger_log({"loss": 1.0}, None)
    first.logger_teardown()
    assert first.path == tmp_path / "version_8" / "metrics.csv"
    first.logger_setup(context_of())
    first.logger_log({"loss": 2.0}, None)
    first.logger_teardown()
    first.logger_teardown()
    assert first.path == tmp_path / "version_9" / "metrics.csv"
    assert rows_of(first) == [{"step": "0", "loss": "2.0"}]
    assert (tmp_path / "version_8" / "metrics.csv").read_bytes() == b"step,loss\r\n0,1.0\r\n"


@pytest.mark.parametrize("make", [CSVLogger, TensorBoardLogger])
def test_only_rank_zero_writes(make: type[CSVLogger] | type[TensorBoardLogger], tmp_path: Path) -> None:
    """On any other rank nothing is made and nothing is written."""
    logger = make(tmp_path / "runs")
    logger.logger_setup(context_of(rank=1, world_size=2))
    logger.logger_log({"loss": 1.0}, 0)
    logger.logger_teardown()
    assert logger.path is None
    assert list(tmp_path.iterdir()) == []


def test_rows_to_keep_must_be_a_number_from_one(tmp_path: Path) -> None:
    """A wrong option is refused when the logger is made."""
    with pytest.raises(SettingError, match=r"flush_rows=0\): it is an integer from 1"):
        CSVLogger(tmp_path, flush_rows=0)


def test_tensorboard_writes_scalars(tmp_path: Path) -> None:
    """Scalars can be read back from the event file of the run's own folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    logger.logger_setup(context_of())
    logger.logger_log({"loss": 0.5, "train/accuracy": 0.25}, 3)
    logger.logger_log({"loss": 0.125}, None)
    logger.logger_teardown()
    logger.logger_teardown()
    assert logger.path == tmp_path / "version_0"
    events = accumulator.EventAccumulator(str(logger.path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 0.5), (1, 0.125)]
    assert [(e.step, e.value) for e in events.Scalars("train/accuracy")] == [(3, 0.25)]


def test_tensorboard_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tensorboard the logger cannot be made, and the message says what to type."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"type \"pip install 'plugframe\[tensorboard\]'\""):
        TensorBoardLogger()


def test_descriptors_say_what_they_need() -> None:
    """The CSV logger needs nothing, the other one says what and how to install it."""
    assert csv_logger.plugin.requires == ()
    assert tensorboard_logger.plugin.requires == ("tensorboard",)
    assert tensorboard_logger.plugin.extra == "plugframe[tensorboard]"


def test_a_run_logs_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``loggers="csv"`` writes below the working folder, and the file is complete after tear-down."""
    monkeypatch.chdir(tmp_path)
    with Lite(accelerator="cpu", devices=1, loggers="csv") as lite:
        for step in range(3):
            lite.log("loss", torch.tensor(0.5) * step, step=step)
    assert (tmp_path / "runs/version_0/metrics.csv").read_text().split() == [
        "step,loss",
        "0,0.0",
        "1,0.5",
        "2,1.0",
    ]


# ---------------------------------------------------------------------- runs that are continued


def metadata(run: Path) -> dict[str, str | None]:
    found: dict[str, str | None] = json.loads((run / "run.json").read_text())
    del found["jobs"]
    return found


def jobs(run: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((run / "run.json").read_text())["jobs"]
    return found


def test_a_run_has_an_id_and_a_status(tmp_path: Path) -> None:
    """It is running from set-up on, and finished or failed in the end, with the error."""
    logger = ready(tmp_path)
    assert metadata(tmp_path / "version_0") == {"run_id": logger.logger_run_id(), "status": "running", "error": None}
    assert [*jobs(tmp_path / "version_0")[0]] == ["begun"]
    logger.logger_teardown(ValueError("the boiler has burst"))
    found = metadata(tmp_path / "version_0")
    assert (found["status"], found["error"]) == ("failed", "ValueError: the boiler has burst")


@pytest.mark.parametrize("make", [CSVLogger, TensorBoardLogger])
def test_a_continued_run_has_one_folder(make: type[CSVLogger] | type[TensorBoardLogger], tmp_path: Path) -> None:
    """The folder of the resuming job is gone; what it recorded before the load is in that of the run."""
    first, second = make(tmp_path), make(tmp_path)
    first.logger_setup(context_of())
    first.logger_log_hyperparams({"lr": 0.5, "seed": 1})
    first.logger_log({"loss": 1.0}, 0)
    state = first.logger_state()
    first.logger_teardown()
    second.logger_setup(context_of())
    second.logger_log_hyperparams({"lr": 0.5, "more": 2})
    second.logger_log_artifact("note", Path(__file__), None)
    second.logger_load_state(state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_0", "version_1"]
    second.logger_log({"loss": 0.5}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["version_0"]
    assert metadata(tmp_path / "version_0")["status"] == "running"
    second.logger_teardown()
    assert json.loads((tmp_path / "version_0/hparams.json").read_text()) == {"lr": 0.5, "seed": 1, "more": 2}
    assert (tmp_path / "version_0/artifacts/note.py").read_bytes() == Path(__file__).read_bytes()
    assert metadata(tmp_path / "version_0") == {"run_id": state["run_id"], "status": "finished", "error": None}
    before, after = jobs(tmp_path / "version_0")
    assert (before["first_step"], after["first_step"]) == (0, 1)
    assert before["begun"] <= before["ended"] <= after["begun"] <= after["ended"]


def test_a_run_is_not_continued_into_another(tmp_path: Path) -> None:
    """Not after metrics, or where it does not exist: the job's own run goes on, with a warning."""
    other = ready(tmp_path)
    state = other.logger_state()
    logger = ready(tmp_path)
    logger.logger_log({"loss": 1.0}, 0)
    with pytest.warns(PlugframeWarning, match="does not continue run .*: this job has logged metrics before the load"):
        logger.logger_load_state(state)
    logger.logger_teardown()
    other.logger_teardown()
    logger = ready(tmp_path)
    with pytest.warns(PlugframeWarning, match="CSVLogger records version_2, and does not continue.*it is not in"):
        logger.logger_load_state({"run_id": "unknown", "calls": 3})
    logger.logger_log({"loss": 2.0}, None)
    logger.logger_teardown()
    assert rows_of(logger) == [{"step": "0", "loss": "2.0"}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_0", "version_1", "version_2"]


def test_a_run_that_another_process_records_is_left_alone(tmp_path: Path) -> None:
    """The lock of a living process counts, whatever the status is."""
    code = (
        "import sys; from plugframe_builtins.csv_logger.logger import CSVLogger; "
        "from plugframe_builtins._shared.run_folder import RunFolder; from pathlib import Path; "
        "run = RunFolder.create(Path(sys.argv[1])); print(run.run_id, flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        run_id = process.stdout.readline().strip()
        logger = ready(tmp_path)
        with pytest.warns(PlugframeWarning, match="another process records it"):
            logger.logger_load_state({"run_id": run_id, "calls": 1})
        process.communicate("\n")
    logger.logger_load_state({"run_id": run_id, "calls": 1})
    logger.logger_log({"loss": 1.0}, None)
    logger.logger_teardown()
    assert (logger.path, rows_of(logger)) == (tmp_path / "version_0/metrics.csv", [{"step": "1", "loss": "1.0"}])


def test_csv_goes_on_after_half_a_row(tmp_path: Path) -> None:
    """A job that is killed while it writes leaves half a row, which the resumed run replaces."""
    first = ready(tmp_path)
    for step in range(3):
        first.logger_log({"loss": step + 0.5}, step)
    state = first.logger_state()
    first.logger_teardown()
    assert first.path is not None
    first.path.write_bytes(first.path.read_bytes()[:-3])
    second = ready(tmp_path)
    second.logger_load_state(state)
    second.logger_log({"loss": 7.0, "rate": 1.0}, 3)
    second.logger_log({"loss": 8.0}, 1)
    second.logger_teardown()
    assert [(row["step"], row["loss"], row["rate"]) for row in rows_of(second)] == [
        ("0", "0.5", ""),
        ("1", "8.0", ""),
        ("3", "7.0", "1.0"),
    ]


def test_a_new_run_can_be_asked_for(tmp_path: Path) -> None:
    """With ``resume=False`` a job that loads a checkpoint records a run of its own."""
    first = ready(tmp_path)
    state = first.logger_state()
    first.logger_teardown()
    second = CSVLogger(tmp_path, resume=False)
    second.logger_setup(context_of())
    second.logger_load_state(state)
    second.logger_teardown()
    assert second.path == tmp_path / "version_1" / "metrics.csv"


def test_tensorboard_shows_the_hyperparameters_from_before_the_first_metric(tmp_path: Path) -> None:
    """TensorBoard reads one summary of a run: later ones are in the file beside it, with a warning."""
    logger = TensorBoardLogger(tmp_path)
    logger.logger_setup(context_of())
    logger.logger_log_hyperparams({"lr": 0.5})
    logger.logger_log({"loss": 1.0}, 0)
    logger.logger_log_hyperparams({"lr": 0.5})
    with pytest.warns(PlugframeWarning, match="hyperparameters from before the first metric: lr is in .*hparams.json"):
        logger.logger_log_hyperparams({"lr": 0.25})
    logger.logger_teardown()
    assert json.loads((tmp_path / "version_0/hparams.json").read_text()) == {"lr": 0.25}
