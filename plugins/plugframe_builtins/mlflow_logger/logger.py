"""A logger that records runs with MLflow."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plugframe.base import Logger, warn_caller
from plugframe.hooks import Artifact, Context, HyperParameter, artifact_kind, hookimpl
from plugframe_builtins._shared.library import library, require
from plugframe_builtins._shared.png import encode_png
from plugframe_builtins.mlflow_logger import plugin

#: Metrics and seconds after which metrics are sent, in one request; MLflow takes 1000 at once.
MOST, SECONDS = 500, 5.0


class MLflowLogger(Logger):
    """Record the run with MLflow on rank 0, from its first record on.

    Args:
        uri: the tracking server or database; empty for MLflow's own choice (``MLFLOW_TRACKING_URI``).
        experiment: the experiment of the run; created if there is none.
        run_name: the name of the run.
        artifacts: where a new experiment keeps its artifacts.
        resume: whether to continue the run of a loaded checkpoint.

    Raises:
        MissingDependencyError: if MLflow is not installed.
    """

    def __init__(
        self,
        *,
        uri: str = "",
        experiment: str = "plugframe",
        run_name: str = "",
        artifacts: str = "",
        resume: bool = True,
    ) -> None:
        require("mlflow", "plugframe[mlflow]", "MLflowLogger")
        plugin.validate(self, uri=uri, experiment=experiment, run_name=run_name, artifacts=artifacts, resume=resume)
        self.uri, self.experiment, self.artifacts, self.resume = uri, experiment, artifacts, resume
        self.run_name = run_name
        self._client: Any = None
        self._id: str | None = None
        self._writes = False
        self._metrics: list[Any] = []
        self._params: dict[str, HyperParameter] = {}

    @hookimpl
    def logger_setup(self, context: Context) -> None:
        self.calls, self._id, self._client = 0, None, None
        self._writes = context.world.global_rank == 0

    def client(self) -> Any:
        """Return MLflow's client, with the run begun or continued: a checkpoint may name another one until then."""
        if self._client is None:
            mlflow = library("mlflow")
            self._client, self._sent = mlflow.MlflowClient(self.uri or None), time.monotonic()
            try:
                if self._id is not None:
                    self._client.update_run(self._id, status="RUNNING")
            except mlflow.MlflowException as error:
                warn_caller(f"MLflowLogger begins a new run, and does not continue {self._id}: {error.message}")
                self._id = None
            if self._id is None:
                found = self._client.get_experiment_by_name(self.experiment)
                number = (
                    found.experiment_id
                    if found
                    else self._client.create_experiment(self.experiment, artifact_location=self.artifacts or None)
                )
                self._id = self._client.create_run(number, run_name=self.run_name or None).info.run_id
        return self._client

    def flush(self) -> None:
        """Send what is kept."""
        metrics, self._metrics, params, self._params = self._metrics, [], self._params, {}
        for name, value in params.items():
            try:
                self.client().log_param(self._id, name, value)
            except library("mlflow").MlflowException as error:  # MLflow never changes the value of a parameter
                warn_caller(f"MLflow does not record {name}={value!r}: {error.message}")
        for start in range(0, len(metrics), MOST):
            self.client().log_batch(self._id, metrics=metrics[start : start + MOST])
        self._sent = time.monotonic()

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        now, number = time.time_ns() // 1_000_000, self.next_step(step)
        self.client()
        metric = library("mlflow.entities").Metric
        self._metrics += [metric(name, value, now, number) for name, value in metrics.items()]
        if len(self._metrics) >= MOST or time.monotonic() - self._sent > SECONDS:
            self.flush()

    @hookimpl
    def logger_log_hyperparams(self, params: Mapping[str, HyperParameter]) -> None:
        self.client()
        self._params.update(params)

    @hookimpl
    def logger_log_artifact(self, name: str, value: Artifact, step: int | None) -> None:
        client, kind, target = self.client(), artifact_kind(value), name if step is None else f"{name}@{step}"
        item: Any = value
        if isinstance(value, Path):
            client.log_artifact(self._id, str(value), target)  # under its own name, in a folder
        elif kind == "image":
            *parents, last = target.split("/")
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder) / f"{last}.png"
                source.write_bytes(encode_png(item))
                client.log_artifact(self._id, str(source), "/".join(parents) or None)
        elif kind == "table":
            columns = list(item[0]) if item else []
            table = {"columns": columns, "data": [list(row.values()) for row in item]}  # what MLflow shows as a table
            client.log_text(self._id, json.dumps(table), f"{target}.json")
        else:
            client.log_text(self._id, item, f"{target}.txt")

    @hookimpl
    def logger_run_id(self) -> str | None:
        return self._id

    @hookimpl
    def logger_load_state(self, state: dict[str, Any]) -> None:
        run_id = state.get("run_id")
        if not self.resume or not self._writes:
            return
        if self._client is not None and run_id != self._id:
            warn_caller(f"MLflowLogger has begun run {self._id}, and does not continue run {run_id}.")
            return
        self._id = run_id
        super().logger_load_state(state)

    @hookimpl
    def logger_teardown(self, error: BaseException | None = None) -> None:
        if self._writes and (self._client is not None or error is not None):
            client = self.client()
            self.flush()
            ended = "KILLED" if isinstance(error, KeyboardInterrupt) else "FINISHED" if error is None else "FAILED"
            client.set_terminated(self._id, ended)
        self._client, self._writes = None, False
