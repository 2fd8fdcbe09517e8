"""The launcher contract suite: start and supervise ranks, return the result, and clean up."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest

from plugframe.errors import RankFailedError, UsageError
from plugframe.hooks import Job
from plugframe.testing.contracts import launched
from plugframe.testing.contracts.base import PluginContract
from plugframe.testing.contracts.running import broken, left, once, one_line, traces

STARTED = "Started (each rank once, with its arguments and variables, in one job)"
RESULT = "Result (the function's result on rank 0; None for a script)"
FAILED = "Failed (a failing rank stops the others, and the RankFailedError holds its rank and error)"
ABLE = "Able (a target that it does not provide, or that cannot be pickled, is a UsageError before any rank starts)"
CLEAN = "Law 9 (nothing is left behind)"


class Outcome:
    """The outcome of one launch."""

    def __init__(self, launcher: Any, folder: Path, **job: Any) -> None:
        folder.mkdir()
        self.folder = folder
        self.result: Any = None
        self.error: BaseException | None = None
        before = traces()
        try:
            self.result = launcher.launcher_launch(job=Job(**job))
        except Exception as error:  # noqa: BLE001 - reported as it is
            self.error = error
        self.left = left(before, traces())

    def written(self, name: str) -> list[dict[str, Any]]:
        """Return the contents of the files that the ranks wrote, by name."""
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob(f"{name}*.json"))]


class LauncherContract(PluginContract):
    """Subclass it and set `spec`. It starts processes, twice for each kind of target that the plugin provides.

    Attributes:
        num_processes: how many ranks to start on this node.
        job: further fields of `Job`, such as ``timeout_s``.
    """

    kind = "launcher"
    num_processes: ClassVar[int] = 2
    job: ClassVar[dict[str, Any]] = {}

    def _provides(self, what: str) -> None:
        if what not in self.descriptor.provides:
            pytest.skip(f"It does not provide {what!r}.")

    def _launch(self, launcher: Any, folder: Path, what: str, call: str, *words: Any) -> Outcome:
        given: dict[str, Any] = {"num_processes": self.num_processes, "environ": {launched.MARK: "set"}, **self.job}
        if what == "script":
            given["command"] = ("-m", launched.__name__, call, str(folder), *words)
        else:
            given |= {"function": getattr(launched, call), "args": (str(folder), *words)}
        return Outcome(launcher, folder, **given)

    @pytest.fixture(params=["function", "script"])
    def what(self, request: pytest.FixtureRequest) -> str:
        """The kind of target: a function or a script."""
        self._provides(request.param)
        return str(request.param)

    @pytest.fixture
    def outcomes(self, what: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Outcome]:
        """A launch in which a rank fails, then one that succeeds, with the same object."""
        return once(self, what, lambda: self._both(what, tmp_path_factory.mktemp("launched")))

    def _both(self, what: str, folder: Path) -> tuple[Outcome, Outcome]:
        launcher = self.make()
        failed = self._launch(launcher, folder / "failed", what, "fail", str(self.num_processes))
        return failed, self._launch(launcher, folder / "succeeded", what, "report", *launched.WORDS)

    def test_each_rank_is_started_once(self, outcomes: tuple[Outcome, Outcome], what: str) -> None:
        """The requested number of processes, with their arguments and variables, forms one job."""
        _, succeeded = outcomes
        if succeeded.error is not None:
            broken(STARTED, f"a {what}, launched after one had failed, raised {one_line(succeeded.error)}")
        ranks = succeeded.written("rank")
        if [each["rank"] for each in ranks] != list(range(self.num_processes)):
            broken(STARTED, f"{self.num_processes} ranks were requested; started were {[r['rank'] for r in ranks]}")
        if len({each["pid"] for each in ranks} | {os.getpid()}) != self.num_processes + 1:
            broken(STARTED, f"two ranks of a {what} share a process, or one runs in the launcher's")
        for each in ranks:
            if each["arguments"] != list(launched.WORDS):
                broken(STARTED, f"the arguments {launched.WORDS} reached rank {each['rank']} as {each['arguments']}")
            if each["mark"] != "set":
                broken(STARTED, f"a variable of Job.environ reached rank {each['rank']} as {each['mark']!r}")
            if (each["size"], each["total"]) != (self.num_processes, sum(range(self.num_processes + 1))):
                broken(STARTED, f"rank {each['rank']} is in a job of {each['size']}")

    def test_it_returns_what_rank_0_returned(self, outcomes: tuple[Outcome, Outcome], what: str) -> None:
        """A launch returns the result of a function on rank 0, and None for a script."""
        _, succeeded = outcomes
        ranks = succeeded.written("rank")
        expected = ranks[0] if what == "function" and ranks else None
        if succeeded.error is None and succeeded.result != expected:
            broken(RESULT, f"a {what} gave {succeeded.result!r}, rank 0 returned {expected!r}")

    def test_a_rank_that_fails_ends_the_job(self, outcomes: tuple[Outcome, Outcome], what: str) -> None:
        """The other ranks are stopped, and the error holds the rank's error and a non-zero exit code."""
        failed, _ = outcomes
        error = failed.error
        if error is None:
            broken(FAILED, f"a rank of a {what} raised, and launcher_launch returned {failed.result!r}")
        if not isinstance(error, RankFailedError):
            broken(FAILED, f"a rank of a {what} raised, and launcher_launch {one_line(error)}, not a RankFailedError")
        if "has burst" not in error.report or "rank " not in error.report:
            broken(FAILED, f"the report holds neither rank nor error of the {what}: {error.report!r}")
        if error.exit_code == 0:
            broken(FAILED, f"a rank of a {what} failed, and the exit code is 0")
        living = [each["pid"] for each in failed.written("pid") if _lives(each["pid"])]
        if living or failed.written("survived"):
            broken(FAILED, f"a rank of a {what} failed, and the others kept running")

    def test_nothing_is_left_behind(self, outcomes: tuple[Outcome, Outcome], what: str) -> None:
        """A launch restores processes, variables, signal handlers and threads, after a failure too."""
        for outcome, how in zip(outcomes, ("failed", "succeeded"), strict=True):
            if outcome.left:
                broken(CLEAN, f"after a {what} that {how} {outcome.left}")

    def test_what_it_cannot_launch_is_refused(self, tmp_path: Path) -> None:
        """A function that cannot be pickled is a one-line error before any process starts."""
        provides = self.descriptor.provides
        if not {"function", "script"} & set(provides):
            broken(ABLE, f"its descriptor has provides={provides!r}: write 'script', 'function' or both")
        self._provides("function")
        ran = tmp_path / "ran"

        def closure() -> str:
            ran.write_text("here")
            return "closure"

        try:
            result = self.make().launcher_launch(job=Job(num_processes=1, function=closure, **self.job))
        except UsageError as error:
            if "interactive" in provides:
                broken(ABLE, f"it provides 'interactive', and refused an interactively defined function: {error}")
            if "\n" in str(error).strip():
                broken(ABLE, f"a function that cannot be pickled was refused in several lines: {error}")
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(ABLE, f"a function that cannot be pickled raised {one_line(error)}, not a UsageError")
        else:
            if result != "closure" or not ran.exists():
                broken(RESULT, f"an interactively defined function gave {result!r}, not its result")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    status = Path(f"/proc/{pid}/stat")
    try:
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
