"""Read what the loggers of other tools have stored: offline files of wandb, databases of MLflow and Trackio."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image

import wandb_files

# No output, no network, no record of this machine; before the libraries are imported.
os.environ.update(
    {
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_DISABLE_CODE": "true",
        "WANDB_X_DISABLE_STATS": "true",
        "WANDB_X_DISABLE_META": "true",
        "WANDB_ERROR_REPORTING": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_OFFLINE": "1",
    }
)


def needs(library: str) -> pytest.MarkDecorator:
    """Return the mark of tests that skip where a library is not installed."""
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")


# ---------------------------------------------------------------- wandb


def wandb_run_id(logger: Any) -> str:
    (file,) = logger.path.parent.glob("run-*.wandb")
    return str(file.stem.removeprefix("run-"))


def wandb_rows(logger: Any) -> list[dict[Any, Any]]:
    return list(wandb_files.history(Path(logger.folder), wandb_run_id(logger)))


class WandbStore:
    """What the contract suite reads, of an offline run."""

    def arguments(self, folder: Path) -> dict[str, Any]:
        return {"folder": str(folder), "mode": "offline"}

    def read(self, logger: Any) -> list[tuple[int, str, float]]:
        """Return the metrics of the history."""
        return [
            (row["global_step"], name, float(value))
            for row in wandb_rows(logger)
            for name, value in row.items()
            if isinstance(name, str) and not name.startswith("_") and name != "global_step"
            if not isinstance(value, list)
            if not (isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity"))
        ]

    def read_hyperparams(self, logger: Any) -> dict[str, Any]:
        return wandb_files.config(Path(logger.folder), wandb_run_id(logger))

    def read_artifact(self, logger: Any, name: str, step: int | None, kind: str) -> Any:
        if kind == "file":
            return (logger.path / f"{name}{'' if step is None else f'@{step}'}.bin").read_bytes()
        steps = (None,) if step is None else (step,)
        rows = [row for row in wandb_rows(logger) if step is None or row.get("global_step") in steps]
        if kind == "text":
            (row,) = [row for row in rows if name in row]
            return row[name]
        (row,) = [row for row in rows if (name, "path") in row]
        path = logger.path / row[name, "path"]
        return np.array(Image.open(path)) if kind == "image" else json.loads(path.read_text())["data"]

    def has_failed(self, logger: Any) -> bool:
        return wandb_files.exit_code(Path(logger.folder), wandb_run_id(logger)) != 0


@pytest.fixture
def nothing_left_behind(nothing_left_behind: None) -> Any:
    """Have wandb forget artifacts, which it keeps until the process ends, with a temporary folder each."""
    yield
    if "wandb" not in sys.modules:
        return
    from wandb.sdk.artifacts.artifact_instance_cache import artifact_instance_cache_by_client_id

    for artifact in artifact_instance_cache_by_client_id.values():
        if artifact._tmp_dir is not None:
            artifact._tmp_dir.cleanup()
    artifact_instance_cache_by_client_id.clear()


# ---------------------------------------------------------------- MLflow


def mlflow_run(logger: Any) -> tuple[Any, str]:
    from mlflow import MlflowClient

    return MlflowClient(logger.uri), logger.logger_run_id()


class MlflowStore:
    """What the contract suite reads, of a database of SQLite."""

    #: Databases have no infinities, and MLflow's names no commas or quotes.
    infinity: ClassVar[float] = 1.7976931348623157e308
    metric_name: ClassVar[str] = "läng e:q"
    _databases: ClassVar[TemporaryDirectory[str]]

    @classmethod
    def setup_class(cls) -> None:
        """Create one empty database: its tables take MLflow seconds."""
        from mlflow import MlflowClient

        cls._databases = TemporaryDirectory()
        MlflowClient(f"sqlite:///{cls._databases.name}/empty.db").search_experiments()

    @classmethod
    def teardown_class(cls) -> None:
        cls._databases.cleanup()

    def arguments(self, folder: Path) -> dict[str, Any]:
        # One for each test: MLflow keeps a connection to every database it has used.
        database = Path(self._databases.name, f"{abs(hash(str(folder.parent)))}.db")
        if not database.exists():
            shutil.copyfile(database.with_name("empty.db"), database)
        return {"uri": f"sqlite:///{database}", "artifacts": str(folder / "artifacts")}

    def read(self, logger: Any) -> list[tuple[int, str, float]]:
        """Return the metrics of the run."""
        client, run_id = mlflow_run(logger)
        return [
            (metric.step, name, metric.value)
            for name in client.get_run(run_id).data.metrics
            for metric in sorted(client.get_metric_history(run_id, name), key=lambda metric: metric.step)
        ]

    def read_hyperparams(self, logger: Any) -> dict[str, Any]:
        client, run_id = mlflow_run(logger)
        return dict(client.get_run(run_id).data.params)

    def read_artifact(self, logger: Any, name: str, step: int | None, kind: str) -> Any:
        client, run_id = mlflow_run(logger)
        suffix = {"image": ".png", "table": ".json", "text": ".txt", "file": "/source.bin"}[kind]
        path = Path(client.get_run(run_id).info.artifact_uri) / f"{name}{'' if step is None else f'@{step}'}{suffix}"
        if kind == "image":
            return np.array(Image.open(path))
        if kind == "table":
            return json.loads(path.read_text())["data"]
        return path.read_text() if kind == "text" else path.read_bytes()

    def has_failed(self, logger: Any) -> bool:
        client, run_id = mlflow_run(logger)
        return bool(client.get_run(run_id).info.status == "FAILED")


# ---------------------------------------------------------------- Trackio


class TrackioStore:
    """What the contract suite reads, of Trackio's database: a project for each logger of a test."""

    folder: ClassVar[TemporaryDirectory[str]]

    @classmethod
    def setup_class(cls) -> None:
        cls.folder = TemporaryDirectory()
        trackio_folder(Path(cls.folder.name))

    @classmethod
    def teardown_class(cls) -> None:
        cls.folder.cleanup()

    def arguments(self, folder: Path) -> dict[str, Any]:
        return {"project": f"p{abs(hash(str(folder.parent)))}"}

    def _rows(self, logger: Any) -> list[dict[str, Any]]:
        from trackio.sqlite_storage import SQLiteStorage

        return list(SQLiteStorage.get_logs(logger.project, logger.logger_run_id()))

    def read(self, logger: Any) -> list[tuple[int, str, float]]:
        return [
            (row["step"], name, float(value))
            for row in self._rows(logger)
            for name, value in row.items()
            if name not in ("step", "timestamp") and not isinstance(value, dict)
        ]

    def read_hyperparams(self, logger: Any) -> dict[str, Any]:
        from trackio.sqlite_storage import SQLiteStorage

        return dict(SQLiteStorage.get_run_config(logger.project, logger.logger_run_id()) or {})

    def read_artifact(self, logger: Any, name: str, step: int | None, kind: str) -> Any:
        from trackio.utils import MEDIA_DIR

        if kind == "file":
            import trackio

            at = "" if step is None else f"-step{step}"
            reference = f"{name.replace('/', '-')}{at}:latest"
            run = trackio.init(logger.project, name=f"read-{uuid4().hex}", embed=False)
            folder = run.use_artifact(reference).download(Path(self.folder.name) / uuid4().hex)
            trackio.finish()
            (file,) = Path(folder).iterdir()
            return file.read_bytes()
        (row,) = [row for row in self._rows(logger) if name in row and step in (None, row["step"])]
        if kind == "image":
            return np.array(Image.open(MEDIA_DIR / row[name]["file_path"]))
        value = row[name]["_value"]
        return [list(each.values()) for each in value] if kind == "table" else value

    def has_failed(self, logger: Any) -> bool:
        from trackio.sqlite_storage import SQLiteStorage

        return any(
            alert["level"] == "error" for alert in SQLiteStorage.get_alerts(logger.project, logger.logger_run_id())
        )


def trackio_folder(folder: Path) -> None:
    """Have Trackio write here: it reads TRACKIO_DIR when it is imported."""
    os.environ["TRACKIO_DIR"] = str(folder)
    import trackio.utils

    if Path(trackio.utils.TRACKIO_DIR) != folder:
        raise RuntimeError("Trackio was imported before, with another TRACKIO_DIR")


def own_methods(store: type) -> dict[str, Any]:
    """Return the attributes of a store for `contract_classes.of_builtins`."""
    return {name: value for name, value in vars(store).items() if not name.startswith("__")}
