"""Every built-in logger passes the suite that third parties subclass (law 3)."""

from __future__ import annotations

import csv
from typing import Any

import pytest

from contract_classes import of_builtins
from plugframe.testing.contracts.logger import LoggerContract, Record


def rows(self: Any, logger: Any) -> list[Record]:
    """Read a CSV file: a row for each step, a column for each metric."""
    with open(logger.path, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    return [
        (int(row["step"]), name, float(text)) for row in table for name, text in row.items() if name != "step" and text
    ]


def events(self: Any, logger: Any) -> list[Record]:
    """Read the event files of one run, all of them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(logger.path), {"scalars": 0})
    found.Reload()
    return [(event.step, name, event.value) for name in found.Tags()["scalars"] for event in found.Scalars(name)]


globals().update(of_builtins("logger", LoggerContract, csv={"read": rows}, tensorboard={"read": events}))
