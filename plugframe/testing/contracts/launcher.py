"""The launcher contract suite: start and supervise ranks, return the result, and clean up."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest

from plugframe.errors import RankFailedError, UnsupportedError, UsageError
from plugframe.hooks import Job
from plugframe.testing.contracts import launched
from plugframe.testing.contracts.base import PluginContract
from plugframe.testing.contracts.running import broken, left, once, one_line, traces

STARTED = "Started (each rank once, in a process of its own, with its arguments)"
VARIABLES = "Variables (each rank has those of the job and of the launching process, unchanged)"
RANKS = "Ranks (they are numbered from 0, and form one job of the requested size)"
RESULT = "Result (the function's result on rank 0; None for a script)"
FAILED = "Failed (a failing rank stops the others, and the RankFailedError holds its rank and error)"
CODE = "Exit code (that of a rank that leaves with one is that of the RankFailedError, whose report names the rank)"
ENDED = "Ended (a launch returns once every rank has ended)"
LOGGED = "Logged (Job.log_dir gets the output of the ranks, or the launcher raises an UnsupportedError)"
ABLE = "Able (a target that it does not provide, or that cannot be pickled, is a UsageError before any rank starts)"
CLEAN = "Law 9 (nothing is left behind)"


_WORD = "kettledrum"


class Outcome:
    """The outcome of one launch.

    Attributes:
        result: what the launch returned.
        error: what it raised.
        at_return: how many ranks had written their place, and how many had ended.
        living: the processes of the ranks that ran when it returned.
        left: what it left in this process.
    """

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
        self.at_return = {name: len(self.written(name)) for name in ("rank", "ended")}
        self.living = [each["pid"] for name in ("pid", "rank") for each in self.written(name) if _lives(each["pid"])]
        self.left = left(before, traces())

    def written(self, name: str) -> list[dict[str, Any]]:
        """Return the contents of the files that the ranks wrote, by name."""
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob(f"{name}*.json"))]


class LauncherContract(PluginContract):
    """Subclass it and set `spec`. It starts processes, thrice for each kind of target that the plugin provides.

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
        given: dict[str, Any] = {"num_processes": self.num_processes, "environ": launched.VARIABLES, **self.job}
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
    def outcomes(self, what: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
        """Launches of one object: two in which a rank fails, then one that succeeds."""
        return once(self, what, lambda: self._launches(what, tmp_path_factory.mktemp("launched")))

    def _launches(self, what: str, folder: Path) -> dict[str, Outcome]:
        launcher = self.make()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in launched.INHERITED.items():
                patch.setenv(name, value)
            return {
                "failed": self._launch(launcher, folder / "failed", what, "fail", str(self.num_processes)),
                "left": self._launch(launcher, folder / "left", what, "leave"),
                "succeeded": self._launch(launcher, folder / "succeeded", what, "report", *launched.WORDS),
            }

    def _ranks(self, outcomes: dict[str, Outcome], rule: str) -> list[dict[str, Any]]:
        """Return what the ranks have written that all succeed."""
        found = outcomes["succeeded"].written("rank")
        if not found:
            error = outcomes["succeeded"].error
            broken(rule, f"no rank came up{'' if error is None else f': {one_line(error)}'}")
        return found

    def test_each_rank_is_started_once(self, outcomes: dict[str, Outcome], what: str) -> None:
        """The requested number of processes starts, with their arguments."""
        succeeded = outcomes["succeeded"]
        if succeeded.error is not None:
            broken(STARTED, f"a {what}, launched after one had failed, raised {one_line(succeeded.error)}")
        ranks = succeeded.written("rank")
        if len(ranks) != self.num_processes:
            broken(STARTED, f"{self.num_processes} ranks were requested; started were {[r['rank'] for r in ranks]}")
        if len({each["pid"] for each in ranks} | {os.getpid()}) != self.num_processes + 1:
            broken(STARTED, f"two ranks of a {what} share a process, or one runs in the launcher's")
        for each in ranks:
            if each["arguments"] != list(launched.WORDS):
                broken(STARTED, f"the arguments {launched.WORDS} reached rank {each['rank']} as {each['arguments']}")

    def test_variables_reach_the_ranks(self, outcomes: dict[str, Outcome], what: str) -> None:
        """Those of the job, with any text, and those of the launching process."""
        for each in self._ranks(outcomes, VARIABLES):
            for name, value in {**launched.VARIABLES, **launched.INHERITED}.items():
                found = each["variables"][name]
                if found != value:
                    whose = "the launching process" if name in launched.INHERITED else "Job.environ"
                    broken(
                        VARIABLES, f"{name}={value!r} of {whose} reached rank {each['rank']} of a {what} as {found!r}"
                    )

    def test_ranks_are_numbered(self, outcomes: dict[str, Outcome], what: str) -> None:
        """Global and local ranks count from 0, and all ranks are in one job."""
        ranks = self._ranks(outcomes, RANKS)
        for number in ("rank", "local_rank"):
            found = sorted(each[number] for each in ranks)
            if found != list(range(len(ranks))):
                broken(RANKS, f"the {number.replace('_', ' ')}s of a {what} on one node are {found}")
        for each in ranks:
            if (each["size"], each["total"]) != (self.num_processes, sum(range(self.num_processes + 1))):
                broken(RANKS, f"rank {each['rank']} is in a job of {each['size']}")
            if each["node_rank"] != 0:
                broken(RANKS, f"rank {each['rank']} is on node {each['node_rank']} of one node")

    def test_every_rank_has_ended(self, outcomes: dict[str, Outcome], what: str) -> None:
        """A launch returns once every rank has ended, also those that take longer than rank 0."""
        succeeded = outcomes["succeeded"]
        ranks = succeeded.at_return["rank"]
        self._ranks(outcomes, ENDED)
        if succeeded.error is None and (succeeded.at_return["ended"] < ranks or succeeded.living):
            broken(ENDED, f"it returned while {len(succeeded.living) or 'some'} of {ranks} ranks of a {what} ran")

    def test_an_exit_code_is_kept(self, outcomes: dict[str, Outcome], what: str) -> None:
        """A rank that leaves with an exit code fails the job with it, and the report names the rank."""
        outcome, rank = outcomes["left"], self.num_processes - 1
        error = outcome.error
        if not isinstance(error, RankFailedError):
            how = "returned" if error is None else f"raised {one_line(error)}"
            broken(CODE, f"rank {rank} of a {what} left with exit code {launched.EXIT_CODE}, and launcher_launch {how}")
        if error.exit_code != launched.EXIT_CODE:
            broken(
                CODE, f"rank {rank} of a {what} left with exit code {launched.EXIT_CODE}, reported {error.exit_code}"
            )
        if f"rank {rank}" not in error.report:
            broken(CODE, f"the report does not name rank {rank}, which left with an exit code: {error.report!r}")
        if outcome.living or outcome.written("survived"):
            broken(CODE, f"rank {rank} of a {what} left with an exit code, and the others kept running")

    def test_it_returns_what_rank_0_returned(self, outcomes: dict[str, Outcome], what: str) -> None:
        """A launch returns the result of a function on rank 0, and None for a script."""
        succeeded = outcomes["succeeded"]
        self._ranks(outcomes, RESULT)
        ranks = succeeded.written("rank0")
        expected = ranks[0] if what == "function" and ranks else None
        if succeeded.error is None and succeeded.result != expected:
            broken(RESULT, f"a {what} gave {succeeded.result!r}, rank 0 returned {expected!r}")

    def test_a_rank_that_fails_ends_the_job(self, outcomes: dict[str, Outcome], what: str) -> None:
        """The other ranks are stopped, and the error holds the rank's error and a non-zero exit code."""
        failed = outcomes["failed"]
        error = failed.error
        if error is None:
            broken(FAILED, f"a rank of a {what} raised, and launcher_launch returned {failed.result!r}")
        if not isinstance(error, RankFailedError):
            broken(FAILED, f"a rank of a {what} raised, and launcher_launch {one_line(error)}, not a RankFailedError")
        if "has burst" not in error.report or "rank " not in error.report:
            broken(FAILED, f"the report holds neither rank nor error of the {what}: {error.report!r}")
        if error.exit_code == 0:
            broken(FAILED, f"a rank of a {what} failed, and the exit code is 0")
        if failed.living or failed.written("survived"):
            broken(FAILED, f"a rank of a {what} failed, and the others kept running")

    def test_nothing_is_left_behind(self, outcomes: dict[str, Outcome], what: str) -> None:
        """A launch restores processes, variables, signal handlers and threads, after a failure too."""
        for how, outcome in outcomes.items():
            if outcome.left:
                broken(CLEAN, f"after a {what} that {how} {outcome.left}")

    def test_output_is_logged_or_refused(self, tmp_path: Path) -> None:
        """`Job.log_dir` gets what the ranks print, unless the launcher refuses it: no field has no effect."""
        given: dict[str, Any] = {"num_processes": 1, "log_dir": str(tmp_path / "logs"), "tee": (), **self.job}
        if "script" in self.descriptor.provides:
            given["command"] = ("-m", launched.__name__, "speak", _WORD)
        elif "function" in self.descriptor.provides:
            given |= {"function": launched.speak, "args": (_WORD,)}
        else:
            pytest.skip("It launches neither scripts nor functions.")
        try:
            self.make().launcher_launch(job=Job(**given))
        except UnsupportedError as error:
            if "log" not in str(error):
                broken(LOGGED, f"it refused a job with log_dir, and its message does not say so: {error}")
            return
        files = [path for path in (tmp_path / "logs").rglob("*") if path.is_file()]
        if not any(_WORD in path.read_text(encoding="utf-8", errors="replace") for path in files):
            broken(LOGGED, f"the rank printed {_WORD!r}, and no file in Job.log_dir holds it ({len(files)} files)")

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
