"""Run the contract suite of plugframe's loggers on a database of SQLite."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest

pytest.importorskip("mlflow", reason="MLflow is not installed: pip install mlflow-skinny")

import numpy as np
from mlflow import MlflowClient
from PIL import Image

from plugframe.testing import LoggerContract


class TestMlflow(LoggerContract):
    spec = "mlflow"
    #: Databases have no infinities, and MLflow's names no commas or quotes.
    infinity: ClassVar[float] = 1.7976931348623157e308
    metric_name: ClassVar[str] = "läng e:q"

    _databases: ClassVar[TemporaryDirectory[str]]

    @classmethod
    def setup_class(cls) -> None:
        """Create one empty database: its tables take MLflow seconds."""
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
        client, run_id = _run(logger)
        return [
            (metric.step, name, metric.value)
            for name in client.get_run(run_id).data.metrics
            for metric in sorted(client.get_metric_history(run_id, name), key=lambda metric: metric.step)
        ]

    def read_hyperparams(self, logger: Any) -> dict[str, Any]:
        client, run_id = _run(logger)
        return dict(client.get_run(run_id).data.params)

    def read_artifact(self, logger: Any, name: str, step: int | None, kind: str) -> Any:
        client, run_id = _run(logger)
        suffix = {"image": ".png", "table": ".json", "text": ".txt", "file": "/source.bin"}[kind]
        path = Path(client.get_run(run_id).info.artifact_uri) / f"{name}{'' if step is None else f'@{step}'}{suffix}"
        if kind == "image":
            return np.array(Image.open(path))
        if kind == "table":
            return json.loads(path.read_text())["data"]
        return path.read_text() if kind == "text" else path.read_bytes()

    def has_failed(self, logger: Any) -> bool:
        client, run_id = _run(logger)
        return bool(client.get_run(run_id).info.status == "FAILED")


def _run(logger: Any) -> tuple[Any, str]:
    return MlflowClient(logger.uri), logger.logger_run_id()
