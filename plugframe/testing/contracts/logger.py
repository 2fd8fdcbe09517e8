"""The logger contract suite: every metric of a run is recorded when it ends, and runs do not mix."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from plugframe.errors import SettingError
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe.testing.contracts.base import PluginContract
from plugframe.testing.contracts.running import broken, lasting, left, listing, one_line, running, traces

RECORDED = "Recorded (every logged metric is recorded with its step and value)"
COUNTED = "Counted (a call without a step is numbered, from 0 in every run)"
APART = "Apart (two runs do not mix, in turn or at the same time)"
RANK_ZERO = "Rank 0 (only rank 0 writes)"
TOLD = "Folder (files in the configured folder, and nowhere else)"
CLOSED = "Closed (tear-down writes pending metrics; it works without a set-up, and twice)"
CLEAN = "Law 9 (nothing is left behind)"

#: A metric's step, name and value.
Record = tuple[int, str, float]


class LoggerContract(PluginContract):
    """Subclass it, set `spec` and give `read`.

    ::

        class TestAcme(LoggerContract):
            spec = "acme"

            def read(self, logger):
                return [(row["step"], row["name"], row["value"]) for row in rows_of(logger.path)]
    """

    kind = "logger"

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Return constructor arguments for a logger that writes into `folder`."""
        return {"folder": str(folder), **self.options}

    def read(self, logger: Any) -> Sequence[Record]:
        """Return the metrics of the run that `logger` has ended, each as (step, name, value)."""
        raise NotImplementedError(f"{type(self).__name__} must give read(): what the logger recorded.")

    # ------------------------------------------------------------------ helpers

    def logger(self, folder: Path) -> Any:
        """Return a new logger that writes into `folder`."""
        return self.make(**self.arguments(folder))

    @contextmanager
    def run(self, logger: Any, *, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Set the logger up on one rank, and tear it down."""
        world = World(global_rank=rank, local_rank=rank, world_size=world_size, local_world_size=world_size)
        context = Context(world=world, device=torch.device("cpu"), hooks=SimpleNamespace(), names={})
        logger.logger_setup(context=context)
        try:
            yield logger
        finally:
            logger.logger_teardown()

    def expect(self, logger: Any, expected: Sequence[Record], *, rule: str, what: str) -> None:
        """Check that the recorded metrics are the expected ones, in any order."""
        found = sorted((int(step), str(name), float(value)) for step, name, value in self.read(logger))
        missing = [record for record in sorted(expected) if record not in found]
        more = [record for record in found if record not in expected]
        if missing or more:
            texts = [f"{records[0]} is {how}" for records, how in ((missing, "missing"), (more, "there")) if records]
            broken(rule, f"{what}: (step, name, value) {', and '.join(texts)}")

    # ------------------------------------------------------------------ metrics

    def test_every_metric_is_recorded(self, tmp_path: Path) -> None:
        """Values of any size, any names, steps in any order, one or several metrics per call are recorded."""
        logger = self.logger(tmp_path / "runs")
        calls: list[tuple[dict[str, float], int]] = [
            ({"loss": 0.5, "accuracy": 0.25}, 0),
            ({"validation/loss": -3.0}, 0),
            ({"loss": 1.25}, 3),
            ({"loss": 2.0**100, "läng,e \"q'": 2.0**-100}, 10_000_000),
            ({"loss": 0.0}, 4),
            ({f"metric{number}": float(number) for number in range(200)}, 5),
        ]
        with self.run(logger):
            for metrics, step in calls:
                try:
                    logger.logger_log(metrics=metrics, step=step)
                except Exception as error:  # noqa: BLE001 - reported as it is
                    broken(RECORDED, f"logger_log({metrics}, step={step}) raised {one_line(error)}")
        expected = [(step, name, value) for metrics, step in calls for name, value in metrics.items()]
        self.expect(logger, expected, rule=RECORDED, what="after tear-down")

    def test_many_steps_are_recorded(self, tmp_path: Path) -> None:
        """Buffered writes lose no metric."""
        logger = self.logger(tmp_path / "runs")
        with self.run(logger):
            for step in range(1037):
                logger.logger_log(metrics={"loss": float(step)}, step=step)
        self.expect(logger, [(step, "loss", float(step)) for step in range(1037)], rule=RECORDED, what="of 1037 steps")

    def test_what_was_logged_is_the_callers_own(self, tmp_path: Path) -> None:
        """The values at the call are recorded, though the caller changes the mapping later."""
        logger, metrics = self.logger(tmp_path / "runs"), {"loss": 1.0}
        with self.run(logger):
            for step in range(3):
                metrics["loss"] = float(step)
                logger.logger_log(metrics=metrics, step=step)
            metrics["loss"] = 99.0
        expected = [(step, "loss", float(step)) for step in range(3)]
        self.expect(logger, expected, rule=RECORDED, what="from one dict that changes")
        if metrics != {"loss": 99.0}:
            broken(RECORDED, f"it changed the caller's metrics to {metrics}")

    def test_calls_without_a_step_are_counted(self, tmp_path: Path) -> None:
        """The first call has step 0, also in the second run of one object."""
        logger = self.logger(tmp_path / "runs")
        for time in ("first", "second"):
            with self.run(logger):
                for value in (4.0, 5.0, 6.0):
                    logger.logger_log(metrics={"loss": value}, step=None)
            expected = [(0, "loss", 4.0), (1, "loss", 5.0), (2, "loss", 6.0)]
            self.expect(logger, expected, rule=COUNTED, what=f"in the {time} run of one object")

    def test_a_run_logs_numbers_and_tensors(self, tmp_path: Path) -> None:
        """`lite.log` records numbers and one-element tensors, and refuses other values by name."""
        logger = self.logger(tmp_path / "runs")
        with running(loggers=logger) as (lite, _):
            lite.log("loss", torch.tensor(0.5, requires_grad=True), step=1)
            lite.log_dict({"a": 2, "b": torch.tensor([0.25])}, step=2)
            mistakes: tuple[Any, ...] = ("high", torch.ones(2), None, [1.0])
            for wrong in mistakes:
                with pytest.raises(SettingError, match="culprit"):
                    lite.log("culprit", wrong, step=3)
        expected = [(1, "loss", 0.5), (2, "a", 2.0), (2, "b", 0.25)]
        self.expect(logger, expected, rule=RECORDED, what="through lite.log")

    # ------------------------------------------------------------------ runs

    def test_runs_one_after_the_other_do_not_mix(self, tmp_path: Path) -> None:
        """A second run, in the same folder or with the same object, does not change the first."""
        first, second = self.logger(tmp_path / "runs"), self.logger(tmp_path / "runs")
        for logger, value in ((first, 1.0), (second, 2.0)):
            with self.run(logger):
                logger.logger_log(metrics={"loss": value}, step=7)
        self.expect(first, [(7, "loss", 1.0)], rule=APART, what="the first run, after a second in the same folder")
        self.expect(second, [(7, "loss", 2.0)], rule=APART, what="the second run in the same folder")

    def test_runs_at_the_same_time_do_not_mix(self, tmp_path: Path) -> None:
        """Two loggers that write into one folder keep their runs separate."""
        first, second = self.logger(tmp_path / "runs"), self.logger(tmp_path / "runs")
        with self.run(first), self.run(second):
            for step in range(3):
                first.logger_log(metrics={"loss": 1.0}, step=step)
                second.logger_log(metrics={"loss": 2.0}, step=step)
        for logger, value in ((first, 1.0), (second, 2.0)):
            expected = [(step, "loss", value) for step in range(3)]
            self.expect(logger, expected, rule=APART, what="one of two runs at the same time")

    def test_only_rank_zero_writes(self, tmp_path: Path) -> None:
        """Other ranks create no file, and log without an error."""
        with self.run(self.logger(tmp_path / "runs"), rank=1, world_size=2):
            pass
        found = listing(tmp_path)
        if found:
            broken(RANK_ZERO, f"on rank 1 it created {', '.join(sorted(found))}")

    # ------------------------------------------------------------------ files and ends

    def test_files_are_where_they_were_told_to_be(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Files are created after set-up only, and in the configured folder only."""
        cwd, folder = tmp_path / "cwd", tmp_path / "told"
        cwd.mkdir()
        monkeypatch.chdir(cwd)
        logger = self.logger(folder)
        if folder.exists() or listing(cwd):
            broken(TOLD, "its constructor, which every rank calls, creates files: create them in logger_setup")
        with self.run(logger):
            logger.logger_log(metrics={"loss": 1.0}, step=0)
        if listing(cwd):
            broken(
                TOLD,
                f"it created {', '.join(sorted(listing(cwd)))} in the working folder, and not in {folder}",
            )

    def test_tear_down_may_come_early_or_twice(self, tmp_path: Path) -> None:
        """Tear-down works without a set-up, and twice."""
        logger = self.logger(tmp_path / "runs")
        try:
            logger.logger_teardown()
            with self.run(logger):
                logger.logger_log(metrics={"loss": 1.0}, step=3)
            logger.logger_teardown()
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(CLOSED, f"tear-down before set-up, or for a second time, raised {one_line(error)}")
        self.expect(logger, [(3, "loss", 1.0)], rule=CLOSED, what="of a run that was torn down twice")

    def test_nothing_is_left_behind(self, tmp_path: Path) -> None:
        """After tear-down no file is open and no thread runs."""
        untouched = traces()
        self._log_once(tmp_path / "first")  # its libraries may change the process on first use
        before, files = traces(), _open_files()
        self._log_once(tmp_path / "second")
        found = left(lasting(untouched), lasting(before)) or left(before, traces())
        still_open = sorted(_open_files() - files)
        if found or still_open:
            broken(CLEAN, f"after tear-down {found or 'files are open: ' + ', '.join(still_open)}")

    def _log_once(self, folder: Path) -> None:
        logger = self.logger(folder)
        with self.run(logger):
            logger.logger_log(metrics={"loss": 1.0}, step=0)


def _open_files() -> set[str]:
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir() if Path("/proc/self/fd").exists() else ():
        try:
            found.add(os.readlink(descriptor))
        except OSError:
            continue  # the descriptor of the listing itself
    return {name for name in found if name.startswith("/") and not name.startswith(("/dev", "/proc"))}
