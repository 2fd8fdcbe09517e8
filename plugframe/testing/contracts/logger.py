"""The logger contract suite: everything logged is recorded when a run ends, and runs do not mix."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from plugframe.testing.contracts.logger_bench import Record, call, tear_down
from plugframe.testing.contracts.logger_rules import (
    APART,
    ARTIFACTS,
    CLEAN,
    CLOSED,
    COUNTED,
    EXACT,
    FAILED,
    FLUSHED,
    HYPERPARAMS,
    RANK_ZERO,
    RECORDED,
    RESUMED,
    STEPS,
    TOLD,
)
from plugframe.testing.contracts.logger_values import LoggerValues
from plugframe.testing.contracts.running import broken, lasting, left, listing, one_line, running, traces

__all__ = [
    "APART",
    "ARTIFACTS",
    "CLEAN",
    "CLOSED",
    "COUNTED",
    "EXACT",
    "FAILED",
    "FLUSHED",
    "HYPERPARAMS",
    "RANK_ZERO",
    "RECORDED",
    "RESUMED",
    "STEPS",
    "TOLD",
    "LoggerContract",
    "Record",
]


class LoggerContract(LoggerValues):
    """Subclass it, set `spec` and give `read`; and the other ``read_…`` methods for what the logger stores.

    ::

        class TestAcme(LoggerContract):
            spec = "acme"

            def read(self, logger):
                return [(row["step"], row["name"], row["value"]) for row in rows_of(logger.path)]
    """

    # ------------------------------------------------------------------ runs

    def test_runs_one_after_the_other_do_not_mix(self, tmp_path: Path) -> None:
        """A second run, in the same folder or with the same object, does not change the first."""
        first, second = self.logger(tmp_path / "runs"), self.logger(tmp_path / "runs")
        for logger, value in ((first, 1.0), (second, 2.0)):
            with self.run(logger):
                self.log(logger, {"loss": value}, 7, rule=APART)
        self.expect(first, [(7, "loss", 1.0)], rule=APART, what="the first run, after a second in the same folder")
        self.expect(second, [(7, "loss", 2.0)], rule=APART, what="the second run in the same folder")

    def test_runs_at_the_same_time_do_not_mix(self, tmp_path: Path) -> None:
        """Two loggers that write into one folder keep their runs separate."""
        first, second = self.logger(tmp_path / "runs"), self.logger(tmp_path / "runs")
        with self.run(first), self.run(second):
            for step in range(3):
                self.log(first, {"loss": 1.0}, step, rule=APART)
                self.log(second, {"loss": 2.0}, step, rule=APART)
        for logger, value in ((first, 1.0), (second, 2.0)):
            expected = [(step, "loss", value) for step in range(3)]
            self.expect(logger, expected, rule=APART, what="one of two runs at the same time")

    def test_several_loggers_of_a_job_record_everything(self, tmp_path: Path) -> None:
        """Each of two loggers of one job records every call."""
        loggers = [self.logger(tmp_path / name) for name in ("first", "second")]
        with running(loggers=loggers) as (lite, _):
            for step in range(3):
                lite.log("loss", float(step), step=step)
        for logger in loggers:
            expected = [(step, "loss", float(step)) for step in range(3)]
            self.expect(logger, expected, rule=APART, what="one of two loggers of a job")

    def test_a_resumed_run_goes_on(self, tmp_path: Path) -> None:
        """A new object that gets the state of a run records under its id, and keeps what is there."""
        first, second = self.logger(tmp_path / "runs"), self.logger(tmp_path / "runs")
        with self.run(first):
            for step in range(3):
                self.log(first, {"loss": float(step)}, step, rule=RESUMED)
            run_id, state = self._id(first), first.logger_state()
        with self.run(second):
            own = second.logger_state()
            call(second.logger_load_state, state=state)
            # A load that fails on another rank is undone.
            call(second.logger_load_state, state=own)
            if second.logger_run_id() == run_id:
                broken(RESUMED, "a load that was undone left the id of the checkpoint's run")
            call(second.logger_load_state, state=state)
            for step in (3, 4):
                self.log(second, {"loss": float(step), "more": 1.0}, step, rule=RESUMED)
            if second.logger_run_id() != run_id:
                broken(RESUMED, f"the run has the id {second.logger_run_id()!r}, and is to continue {run_id!r}")
        expected = [(step, "loss", float(step)) for step in range(5)] + [(3, "more", 1.0), (4, "more", 1.0)]
        self.expect(second, expected, rule=RESUMED, what="of a run that was continued after 3 steps")

    def test_a_resumed_run_goes_on_counting(self, tmp_path: Path) -> None:
        """Calls without a step are numbered on from those of the checkpoint, and replace what came after it."""
        first, second = self.logger(tmp_path / "runs"), self.logger(tmp_path / "runs")
        with self.run(first):
            for value in (0.0, 1.0):
                self.log(first, {"loss": value}, None, rule=RESUMED)
            self._id(first)
            state = first.logger_state()
        with self.run(second):
            call(second.logger_load_state, state=state)
            self.log(second, {"loss": 2.0}, None, rule=RESUMED)
        expected = [(step, "loss", float(step)) for step in range(3)]
        self.expect(second, expected, rule=RESUMED, what="of calls without a step, continued after 2 of them")

    def _id(self, logger: Any) -> str:
        run_id = logger.logger_run_id() if hasattr(logger, "logger_run_id") else None
        if run_id is None:
            pytest.skip("It gives its runs no ids.")
        return str(run_id)

    def test_only_rank_zero_writes(self, tmp_path: Path) -> None:
        """Other ranks create no file, and take the state of a run without an error."""
        first, second = self.logger(tmp_path / "first"), self.logger(tmp_path / "second")
        with self.run(first):
            state = first.logger_state() if hasattr(first, "logger_state") else None
        with self.run(second, rank=1, world_size=2):
            if state is not None:
                second.logger_state()
                call(second.logger_load_state, state=state)
        found = {name for name in listing(tmp_path) if not name.startswith("first")}
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
            self.log(logger, {"loss": 1.0}, 0, rule=TOLD)
        if listing(cwd):
            broken(TOLD, f"it created {', '.join(sorted(listing(cwd)))} in the working folder, and not in {folder}")

    @pytest.mark.parametrize("rows", [1, 2, 7])
    def test_the_last_metrics_are_written(self, tmp_path: Path, rows: int) -> None:
        """Nothing stays in a buffer when a run ends, with an error or without."""
        for error in (None, ValueError("the boiler has burst")):
            logger = self.logger(tmp_path / f"runs{error is None}")
            try:
                with self.run(logger):
                    for step in range(rows):
                        self.log(logger, {"loss": float(step), "rate": 0.5}, step, rule=FLUSHED)
                    if error is not None:
                        raise error
            except ValueError:
                pass
            expected = [(step, name, float(step) if name == "loss" else 0.5) for step in range(rows) for name in _BOTH]
            how = "ends well" if error is None else "raises"
            self.expect(logger, expected, rule=FLUSHED, what=f"of {rows} steps of a run that {how}")

    def test_a_failed_run_is_recorded_as_failed(self, tmp_path: Path) -> None:
        """A run that raises is recorded as failed, with its metrics; one that ends well is not."""
        for fails in (True, False):
            logger = self.logger(tmp_path / f"runs{fails}")
            try:
                with running(loggers=logger) as (lite, _):
                    lite.log("loss", 1.0, step=0)
                    if fails:
                        raise ValueError("the boiler has burst")
            except ValueError as error:
                if "boiler" not in str(error):
                    broken(FAILED, f"the tear-down of a run that raised raised {one_line(error)}")
            self.expect(logger, [(0, "loss", 1.0)], rule=FAILED, what=f"of a run that {'raised' if fails else 'ended'}")
            try:
                recorded = self.has_failed(logger)
            except NotImplementedError:
                pytest.skip("has_failed() is not given: it does not record how a run ended.")
            if recorded != fails:
                ended, how = ("raised", "not failed") if fails else ("ended well", "failed")
                broken(FAILED, f"a run that {ended} is recorded as {how}")

    def test_tear_down_may_come_early_or_twice(self, tmp_path: Path) -> None:
        """Tear-down works without a set-up, and twice."""
        logger = self.logger(tmp_path / "runs")
        try:
            tear_down(logger)
            with self.run(logger):
                self.log(logger, {"loss": 1.0}, 3, rule=CLOSED)
            tear_down(logger)
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
            self.log(logger, {"loss": 1.0}, 0, rule=CLEAN)


_BOTH = ("loss", "rate")


def _open_files() -> set[str]:
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir() if Path("/proc/self/fd").exists() else ():
        try:
            found.add(os.readlink(descriptor))
        except OSError:
            continue  # the descriptor of the listing itself
    return {name for name in found if name.startswith("/") and not name.startswith(("/dev", "/proc"))}
