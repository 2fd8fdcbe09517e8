"""What loggers record: metrics, hyperparameters and artifacts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from plugframe.errors import SettingError
from plugframe.testing.contracts.logger_bench import LoggerBench, Record, warned
from plugframe.testing.contracts.logger_rules import ARTIFACTS, COUNTED, EXACT, HYPERPARAMS, RECORDED, STEPS
from plugframe.testing.contracts.running import broken, running

_TABLE = [{"name": "a|b", "score": 0.5, "count": 3}, {"name": 'läng,e "q"', "score": -1e-3, "count": 0}]
_TEXT = "first line\nzweite Zeile: ä\n"
_BYTES = bytes(range(256)) * 4
_NESTED = {
    "lr": 0.5,
    "model": {"layers": 2, "name": "net"},
    "flags": {"amp": True},
    "seed": None,
    "kind": torch.float32,
}
_FLAT = {"lr": 0.5, "model/layers": 2, "model/name": "net", "flags/amp": True, "seed": None, "kind": "torch.float32"}


class LoggerValues(LoggerBench):
    """Every value that is logged is recorded."""

    def test_every_metric_is_recorded(self, tmp_path: Path) -> None:
        """Values of any size, any names, one or several metrics per call are recorded."""
        logger = self.logger(tmp_path / "runs")
        calls: list[tuple[dict[str, float], int]] = [
            ({"loss": 0.5, "accuracy": 0.25}, 0),
            ({"validation/loss": -3.0}, 0),
            ({"loss": 1.25}, 3),
            ({"loss": 2.0**100, self.metric_name: 2.0**-100}, 10_000_000),
            ({"loss": 0.0}, 10_000_001),
            ({f"metric{number}": float(number) for number in range(200)}, 10_000_002),
        ]
        with self.run(logger):
            for metrics, step in calls:
                self.log(logger, metrics, step, rule=RECORDED)
        expected = [(step, name, value) for metrics, step in calls for name, value in metrics.items()]
        self.expect(logger, expected, rule=RECORDED, what="after tear-down")

    def test_many_steps_are_recorded(self, tmp_path: Path) -> None:
        """Buffered writes lose no metric."""
        logger = self.logger(tmp_path / "runs")
        with self.run(logger):
            for step in range(1037):
                self.log(logger, {"loss": float(step)}, step, rule=RECORDED)
        self.expect(logger, [(step, "loss", float(step)) for step in range(1037)], rule=RECORDED, what="of 1037 steps")

    def test_what_was_logged_is_the_callers_own(self, tmp_path: Path) -> None:
        """The values at the call are recorded, though the caller changes the mapping later."""
        logger, metrics = self.logger(tmp_path / "runs"), {"loss": 1.0}
        with self.run(logger):
            for step in range(3):
                metrics["loss"] = float(step)
                self.log(logger, metrics, step, rule=RECORDED)
            metrics["loss"] = 99.0
        expected = [(step, "loss", float(step)) for step in range(3)]
        self.expect(logger, expected, rule=RECORDED, what="from one dict that changes")
        if metrics != {"loss": 99.0}:
            broken(RECORDED, f"it changed the caller's metrics to {metrics}")

    def test_steps_are_kept(self, tmp_path: Path) -> None:
        """Steps that skip, go back, or come in turn with those of other metrics stay with their values."""
        logger = self.logger(tmp_path / "runs")
        calls = [(3, "loss", 1.0), (1, "validation", 2.0), (5, "loss", 3.0), (2, "validation", 4.0), (4, "loss", 5.0)]
        with self.run(logger):
            for step, name, value in calls:
                self.log(logger, {name: value}, step, rule=STEPS)
        self.expect(logger, calls, rule=STEPS, what="of steps that go back")

    def test_order_is_kept(self, tmp_path: Path) -> None:
        """Values of rising steps are stored in that order."""
        logger = self.logger(tmp_path / "runs")
        values = [float(value) for value in (5, 1, 4, 1, 3, 9, 2)]
        with self.run(logger):
            for step, value in enumerate(values):
                self.log(logger, {"loss": value, "other": -value}, step, rule=STEPS)
        for name, sign in (("loss", 1), ("other", -1)):
            found = [value for _, other, value in self.found(logger) if other == name]
            if found != [sign * value for value in values]:
                broken(STEPS, f"{name} was logged as {[sign * value for value in values]}, and is stored as {found}")

    def test_values_are_exact(self, tmp_path: Path) -> None:
        """No value is rounded further than to the format of the logger; NaN and infinities are recorded."""
        logger = self.logger(tmp_path / "runs")
        values = [0.1 + 0.2, 1 / 3, 1e-30, -123456789.123456789, math.inf, -math.inf, math.nan]
        with self.run(logger):
            for step, value in enumerate(values):
                self.log(logger, {"loss": value}, step, rule=EXACT)
        expected = [(step, "loss", value) for step, value in enumerate(values)]
        self.expect(logger, expected, rule=EXACT, what=f"stored as {self.float_dtype}")

    def test_calls_without_a_step_are_counted(self, tmp_path: Path) -> None:
        """The first call has step 0, also in the second run of one object."""
        logger = self.logger(tmp_path / "runs")
        for time in ("first", "second"):
            with self.run(logger):
                for value in (4.0, 5.0, 6.0):
                    self.log(logger, {"loss": value}, None, rule=COUNTED)
            expected = [(0, "loss", 4.0), (1, "loss", 5.0), (2, "loss", 6.0)]
            self.expect(logger, expected, rule=COUNTED, what=f"in the {time} run of one object")

    def test_a_run_logs_numbers_and_tensors(self, tmp_path: Path) -> None:
        """`lite.log` records numbers and one-element tensors, and refuses other values by name."""
        logger = self.logger(tmp_path / "runs")
        with running(loggers=logger) as (lite, _):
            lite.log("loss", torch.tensor(0.5, requires_grad=True), step=1)
            lite.log_dict({"a": 2, "b": torch.tensor([0.25])}, step=2)
            lite.log_dict({"flag": True, "half": torch.tensor(1.5, dtype=torch.bfloat16)}, step=3)
            mistakes: tuple[Any, ...] = ("high", torch.ones(2), None, [1.0])
            for wrong in mistakes:
                with pytest.raises(SettingError, match="culprit"):
                    lite.log("culprit", wrong, step=3)
        expected: list[Record] = [(1, "loss", 0.5), (2, "a", 2.0), (2, "b", 0.25), (3, "flag", 1.0), (3, "half", 1.5)]
        self.expect(logger, expected, rule=RECORDED, what="through lite.log")

    # ------------------------------------------------------------------ hyperparameters and artifacts

    def test_hyperparameters_are_recorded(self, tmp_path: Path) -> None:
        """Nested ones are flat; later ones are added; a logger that stores none warns once, by its name."""
        logger = self.logger(tmp_path / "runs")
        with warned() as messages, running(loggers=logger) as (lite, _):
            lite.log_hyperparams(_NESTED)
            lite.log_hyperparams({"lr": 0.25})
            lite.log("loss", 1.0, step=0)
        if self._dropped(logger, messages, "hyperparameters", HYPERPARAMS):
            return
        found = self._read(HYPERPARAMS, "read_hyperparams", logger)
        for name, value in {**_FLAT, "lr": 0.25}.items():
            given = found.get(name, "missing")
            # Some stores keep texts only, and others know no names with a slash.
            given = found.get(name.replace("/", "."), given)
            if not (given == value or str(given).lower() in (str(value).lower(), "null" * (value is None))):
                broken(HYPERPARAMS, f"{name} was logged as {value!r}, and is {given!r}")
        self.expect(logger, [(0, "loss", 1.0)], rule=HYPERPARAMS, what="a metric beside them")

    @pytest.mark.parametrize("kind", ["image", "table", "text", "file"])
    def test_artifacts_are_recorded(self, tmp_path: Path, kind: str) -> None:
        """An artifact with a step and one without are recorded; a logger that stores none warns once, by its name."""
        logger, source = self.logger(tmp_path / "runs"), tmp_path / "source.bin"
        source.write_bytes(_BYTES)
        image = (torch.arange(5 * 7 * 3) * 2).reshape(3, 5, 7).to(torch.uint8)
        value: Any = {"image": image, "table": _TABLE, "text": _TEXT, "file": source}[kind]
        with warned() as messages, running(loggers=logger) as (lite, _):
            lite.log_artifact("some/first", value)
            lite.log_artifact("second", value, step=3)
            if kind == "image":
                value.zero_()  # the logger's is its own
            source.write_bytes(b"changed")
            lite.log("loss", 1.0, step=0)
        if self._dropped(logger, messages, f"{kind}s", ARTIFACTS):
            return
        for name, step in (("some/first", None), ("second", 3)):
            found = self._read(ARTIFACTS, "read_artifact", logger, name, step, kind)
            if not _equal(kind, found):
                broken(ARTIFACTS, f"the {kind} {name!r} (step {step}) is recorded as {str(found)[:100]!r}")
        self.expect(logger, [(0, "loss", 1.0)], rule=ARTIFACTS, what=f"a metric beside the {kind}s")

    def _dropped(self, logger: Any, messages: list[str], what: str, rule: str) -> bool:
        """Return whether the logger has warned that it does not store `what`."""
        found = [message for message in messages if f"does not store {what}" in message]
        if len(found) > 1:
            broken(rule, f"it warned {len(found)} times that it does not store {what}")
        if found and type(logger).__name__ not in found[0] and self.entry.name not in found[0]:
            broken(rule, f"its warning does not name it: {found[0]}")
        return bool(found)

    def _read(self, rule: str, reader: str, logger: Any, *arguments: Any) -> Any:
        try:
            return getattr(self, reader)(logger, *arguments)
        except NotImplementedError:
            broken(rule, f"nothing was warned of, and {type(self).__name__} has no {reader}() to show what is recorded")
        except (OSError, KeyError, IndexError, ValueError) as error:
            broken(rule, f"{reader}{arguments} raised {type(error).__name__}: {error}: it is not recorded")


def _equal(kind: str, found: Any) -> bool:
    """Return whether an artifact was read back as it was logged."""
    if kind == "image":
        expected = (torch.arange(5 * 7 * 3) * 2).reshape(3, 5, 7).permute(1, 2, 0).to(torch.uint8)
        pixels = torch.as_tensor(found)
        return pixels.shape == expected.shape and bool((pixels == expected).all())
    if kind == "table":
        rows = [list(row.values()) if isinstance(row, dict) else list(row) for row in found]
        return [[str(cell) for cell in row] for row in rows] == [[str(c) for c in row.values()] for row in _TABLE]
    return bool(found == (_TEXT if kind == "text" else _BYTES))
