"""Failure reports: the rank that is named as the cause, and the text."""

from __future__ import annotations

from typing import Any

import pluggy
import pytest

from plugframe import UnsupportedError, hookimpl
from plugframe.hooks import KINDS
from plugframe.launch.rank import formatted
from plugframe.launch.report import RankExit, find_culprit, report

LOST = "RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:40125"


def error_file(message: str, *types: str, code: int = 1, said: str = "") -> dict[str, Any]:
    stack = f"Traceback (most recent call last):\n  ...\n{message}\n"
    return {
        "message": {"message": message, "extraInfo": {"py_callstack": stack, "timestamp": "0"}},
        "types": [*types, "Exception"],
        "exit_code": code,
        "said": said,
    }


def raised(rank: int, message: str, time: float, *types: str, exit_code: int | None = 1) -> RankExit:
    return RankExit(rank=rank, exit_code=exit_code, time=time, error=error_file(message, *types))


def first_line(*exits: RankExit, **settings: Any) -> str:
    return report(exits, host="h", **settings).text.splitlines()[0]


def test_the_first_exception_is_the_cause() -> None:
    """Among ranks that raised, the earliest is the cause, regardless of the order in which torch noticed them."""
    exits = (raised(0, "ValueError: late", 10.5), raised(1, "KeyError: 'early'", 10.25))
    assert first_line(*exits) == "rank 1 on h failed: KeyError: 'early'"


@pytest.mark.parametrize(
    "lost",
    [
        raised(0, LOST, 10.0, "RuntimeError"),
        raised(0, "DistBackendError: remote", 10.0, "DistBackendError", "RuntimeError"),
        raised(0, "ConnectionResetError: [Errno 104]", 10.0, "ConnectionResetError", "ConnectionError"),
    ],
)
@pytest.mark.parametrize(
    ("other", "said"),
    [
        (raised(1, "ValueError: cause", 12.0), "failed: ValueError: cause"),
        (RankExit(rank=1, exit_code=-9), "was killed by SIGKILL"),
        (RankExit(rank=1, exit_code=-6), "was killed by SIGABRT"),
        (RankExit(rank=1, exit_code=3), "exited with code 3"),
    ],
)
def test_a_lost_connection_is_a_consequence(lost: RankExit, other: RankExit, said: str) -> None:
    """A rank that only detected the loss of another is not the cause, even if it failed first."""
    found = report((lost, other), host="h")
    assert found.text.splitlines()[0] == f"rank 1 on h {said}"
    assert found.text.splitlines()[-1].startswith("rank 0: ")
    assert found.text.endswith("(a consequence)")
    assert found.certain


@pytest.mark.parametrize(
    ("other", "by_itself"),
    [
        (raised(0, "KeyError: 'own'", 12.0), True),
        (raised(0, "ValueError: cause", 12.0), False),
        (raised(0, LOST, 12.0, "RuntimeError"), False),
        (RankExit(rank=0, exit_code=-15), False),
    ],
)
def test_other_ranks_may_have_failed_by_themselves(other: RankExit, by_itself: bool) -> None:
    """Independent failures of other ranks are detected, because their tracebacks differ from the culprit's."""
    assert report((raised(1, "ValueError: cause", 10.0), other), host="h").others_failed == by_itself


def test_a_lost_connection_alone_is_told_as_it_is() -> None:
    """Without another candidate the lost connection is the cause; much later errors are not."""
    lost = raised(0, LOST, 10.0)
    victim = RankExit(rank=1, exit_code=-15, time=11.0)
    assert first_line(lost, victim) == f"rank 0 on h failed: {LOST}"
    assert first_line(lost, raised(1, "ValueError: in a teardown", 70.0)) == f"rank 0 on h failed: {LOST}"
    assert not report((lost, victim), host="h").certain


def test_only_the_last_frame_of_a_traceback_is_marked() -> None:
    """Position markers are shown for the last frame only: Python 3.13 marks every call."""

    def fails(number: int) -> float:
        return (1 + 2) / number

    def calls() -> float:
        return 1 + fails(0)

    with pytest.raises(ZeroDivisionError) as caught:
        calls()
    lines = "".join(formatted(caught.value)).splitlines()
    marked = [index for index, line in enumerate(lines) if line.strip() and not line.strip(" ~^")]
    assert marked in ([], [len(lines) - 2])  # Python 3.10 marks nothing


def test_of_what_a_plugin_refuses_the_users_frames_are_shown() -> None:
    """Frames between the user's call and the plugin, pluggy's included, are hidden."""

    class Refuses:
        @hookimpl
        def on_setup(self, module: object) -> None:
            raise UnsupportedError("not with this strategy")

    manager = pluggy.PluginManager("plugframe")
    manager.add_hookspecs(KINDS["extension"].spec)
    manager.register(Refuses())
    with pytest.raises(UnsupportedError) as caught:
        manager.hook.on_setup(module=None)
    files = [line.split('"')[1] for line in formatted(caught.value) if line.startswith("  File ")]
    assert files == [__file__] * 2


def test_ranks_ended_by_the_launcher_are_victims() -> None:
    """Ranks ended by SIGTERM or by the launcher's SIGKILL are not the cause, unless no other rank failed."""
    stubborn = RankExit(rank=0, exit_code=-9, killed_by_launcher=True)
    assert first_line(stubborn, RankExit(rank=1, exit_code=3)) == "rank 1 on h exited with code 3"
    first, second = RankExit(rank=2, exit_code=-15, time=1.0), RankExit(rank=0, exit_code=-15, time=2.0)
    assert first_line(second, first) == "rank 2 on h was killed by SIGTERM"


def test_other_ranks_are_folded() -> None:
    """Each outcome is one line, with ranges of ranks."""
    exits = [RankExit(rank=rank, exit_code=-15) for rank in (0, 2, 3, 4, 7)]
    exits += [RankExit(rank=5, exit_code=0), raised(6, "OSError: also", 12.0), raised(1, "ValueError: x", 11.0)]
    assert report(exits, host="h").text.splitlines()[-3:] == [
        "ranks 0, 2-4 and 7: stopped by the launcher",
        "rank 5: had finished",
        "rank 6: failed: OSError: also",
    ]


def test_out_of_memory_is_said_only_where_it_is_known() -> None:
    """A SIGKILL is reported as out of memory only if the kernel's counter increased."""
    killed = RankExit(rank=0, exit_code=-9)
    assert first_line(killed) == "rank 0 on h was killed by SIGKILL"
    assert first_line(killed, out_of_memory=True).endswith("SIGKILL, out of memory (kernel OOM killer)")
    assert "memory" not in first_line(RankExit(rank=0, exit_code=-11), out_of_memory=True)


@pytest.mark.parametrize(
    ("rank_exit", "code"),
    [
        (RankExit(rank=0, exit_code=-11), 139),
        (RankExit(rank=0, exit_code=5), 5),
        (RankExit(rank=0), 1),
        (
            RankExit(
                rank=0, exit_code=-9, killed_by_launcher=True, error=error_file("SystemExit: 7", "SystemExit", code=7)
            ),
            7,
        ),
    ],
)
def test_the_exit_code_is_the_culprits(rank_exit: RankExit, code: int) -> None:
    """The exit code in the error file takes precedence over the code of the killed process."""
    assert report([rank_exit], host="h").exit_code == code


def test_nobody_is_blamed_without_evidence() -> None:
    """Between two attempts, exit codes may still be unknown."""
    assert find_culprit([]) is None
    assert find_culprit([RankExit(rank=0), RankExit(rank=1)]) is None
    assert find_culprit([RankExit(rank=0, exit_code=-15), RankExit(rank=1)]) is None
    assert find_culprit([RankExit(rank=0, exit_code=-15), RankExit(rank=1, exit_code=-9)]) == RankExit(
        rank=1, exit_code=-9
    )
