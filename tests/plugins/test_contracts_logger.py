"""Every built-in logger passes the suite that third parties subclass (law 3)."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from contract_classes import of_builtins
from logger_stores import MlflowStore, TrackioStore, WandbStore, needs, nothing_left_behind, own_methods
from plugframe.testing.contracts.logger import LoggerContract, Record


def rows(self: Any, logger: Any) -> list[Record]:
    """Read a CSV file: a row for each step, a column for each metric."""
    with open(logger.path, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    return [
        (int(row["step"]), name, float(text)) for row in table for name, text in row.items() if name != "step" and text
    ]


def accumulated(logger: Any) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(logger.path), {"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def events(self: Any, logger: Any) -> list[Record]:
    """Read the event files of one run, all of them."""
    found = accumulated(logger)
    return [(event.step, name, event.value) for name in found.Tags()["scalars"] for event in found.Scalars(name)]


def hyperparams(self: Any, logger: Any) -> Any:
    return json.loads((logger.run.path / "hparams.json").read_text())


def event_hyperparams(self: Any, logger: Any) -> Any:
    """Read them from the event files."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    # The accumulator keeps the last summary of a tag.
    content = accumulated(logger).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    info = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in info.hparams.items()}


def artifact(self: Any, logger: Any, name: str, step: int | None, kind: str) -> Any:
    """Read it from the run's folder."""
    suffix = {"image": ".png", "table": ".csv", "text": ".txt", "file": ".bin"}[kind]
    path = logger.run.path / "artifacts" / f"{name}{'' if step is None else f'@{step}'}{suffix}"
    if kind == "image":
        return np.array(Image.open(path))
    if kind == "table":
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    return path.read_text(encoding="utf-8") if kind == "text" else path.read_bytes()


def event_artifact(self: Any, logger: Any, name: str, step: int | None, kind: str) -> Any:
    """Read images and texts from the event files, and the others from the run's folder."""
    if kind not in ("image", "text"):
        return artifact(self, logger, name, step, kind)
    found = accumulated(logger)
    if kind == "image":
        (event,) = found.Images(name)
        return np.array(Image.open(io.BytesIO(event.encoded_image_string)))
    (event,) = found.Tensors(f"{name}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def has_failed(self: Any, logger: Any) -> bool:
    return bool(json.loads((logger.run.path / "run.json").read_text())["status"] == "failed")


COMMON = {"has_failed": has_failed}
globals().update(
    of_builtins(
        "logger",
        LoggerContract,
        csv={"read": rows, "read_hyperparams": hyperparams, "read_artifact": artifact, **COMMON},
        tensorboard={
            "read": events,
            "float_dtype": "float32",
            "read_hyperparams": event_hyperparams,
            "read_artifact": event_artifact,
            **COMMON,
        },
        wandb={
            **own_methods(WandbStore),
            "nothing_left_behind": nothing_left_behind,
            "pytestmark": [needs("wandb"), pytest.mark.ranks],  # it starts a process, wandb-core
        },
        mlflow={
            **own_methods(MlflowStore),
            "pytestmark": [
                needs("mlflow"),
                # MLflow 3.17 uses what SQLAlchemy 2.1 deprecates.
                pytest.mark.filterwarnings("ignore::DeprecationWarning"),
            ],
        },
        trackio={**own_methods(TrackioStore), "pytestmark": needs("trackio")},
    )
)
