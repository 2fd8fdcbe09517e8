"""Stall reports: ranks that wait for a rank that is elsewhere report it on stderr and keep waiting."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from plugframe import Lite
from plugframe.diagnostics.call_log import Call, CallLog
from plugframe.diagnostics.rank_status import RankStatus
from plugframe.diagnostics.stall_report import report, start_stall_reporter
from plugframe.hooks.world import World
from ranks import rank_store, run_ranks

AFTER_S = 0.2


def status(rank: int, number: int | None, *, line: int = 57, name: str = "barrier", **more: Any) -> RankStatus:
    call = None if number is None else Call(number, f"collective_{name}", name, "", "train.py", line, False)
    return RankStatus(rank=rank, host="here", running=call, **more)


def test_ranks_that_are_slow_together_are_not_told_of() -> None:
    """Ranks in the same call are merely slow: nothing is reported."""
    assert report({0: status(0, 8), 1: status(1, 8)}, 0, 30.0) == ""


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            status(1, None, activity="in validate (train.py:31)"),
            "plugframe: still waiting for rank 1 after 30 s: rank 0 waits in barrier (train.py:57, call 8); "
            "rank 1 is in validate (train.py:31).",
        ),
        (status(1, 7, line=40), "rank 1 waits in barrier (train.py:40, call 7). Every rank must make the same calls"),
        (status(1, None, shut_down=True), "rank 1 has shut down."),
        (None, "rank 1 did not respond within 5 s"),
    ],
)
def test_one_line_says_who_waits_and_who_is_elsewhere(other: RankStatus | None, says: str) -> None:
    """The line has the awaited rank, its position, and a likely cause."""
    text = report({0: status(0, 8), 1: other}, 0, 30.0)
    assert says in text
    assert "\n" not in text


def test_work_within_one_call_is_no_mistake() -> None:
    """A rank that writes a checkpoint while others wait at the same line is reported without a hint."""
    text = report({0: status(0, 8), 1: status(1, 7, name="save")}, 0, 30.0)
    assert text.endswith("rank 1 waits in save (train.py:57, call 7).")


@pytest.mark.parametrize("settings", [{"report_after_s": 0.0}, {"timeout_s": 30.0}, {"provides": ("simulated",)}])
def test_nothing_watches_where_there_is_nothing_to_tell(settings: dict[str, Any]) -> None:
    """No thread is started with report_after_s=0, an earlier timeout, or simulated ranks."""
    given = {
        "report_after_s": 30.0,
        "timeout_s": None,
        "world": World(),
        "provides": (),
        **settings,
    }
    context: Any = SimpleNamespace(**{**given, "provides": {"collective": given["provides"]}})
    reporter: Any = None
    assert start_stall_reporter(context, CallLog(), reporter) is None


# ---------------------------------------------------------------------- on two ranks


class Lines:
    """Fake stderr whose output the other rank can wait for."""

    def __init__(self, store: Any, name: str) -> None:
        self.store, self.name, self.text = store, name, ""

    def write(self, text: str) -> int:
        self.text += text
        if "still waiting" in self.text and self.text.endswith("\n"):
            self.store.set(self.name, self.text)
        return len(text)

    def flush(self) -> None:
        pass


class Slow(torch.nn.Module):
    """Module whose forward does something else first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.first: Callable[[], None] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.first()
        return self.layer(x)


@contextmanager
def lines(store: Any, name: str) -> Any:
    before, stream = sys.stderr, Lines(store, name)
    sys.stderr = stream  # type: ignore[assignment]
    try:
        yield stream
    finally:
        sys.stderr = before


def lite_of(**settings: Any) -> Lite:
    return Lite(accelerator="cpu", devices=2, strategy="ddp", **{"timeout_s": 60.0, **settings})


def on_a_rank(world: World) -> dict[str, str]:
    """Reach several calls late, each after the other rank has reported it; return this rank's reports."""
    store, found, waits = rank_store(60.0), {}, world.global_rank == 0
    threads = set(threading.enumerate())

    def validate(name: str) -> None:
        store.wait([name])

    with lite_of(report_after_s=AFTER_S) as lite:
        lite.launch()
        with lines(store, "barrier") as stream:
            if not waits:
                validate("barrier")
            lite.barrier()
        found["barrier"] = stream.text
        model = lite.setup(Slow())
        with lines(store, "backward") as stream:
            if not waits:
                model.first = lambda: validate("backward")
            lite.backward(model(torch.ones(1, 2)).sum())
        found["backward"] = stream.text
        with lines(store, "first") as stream, lite.rank_zero_first():
            if waits:
                validate("first")
        found["first"] = stream.text
        with lines(store, "together") as stream:
            for _ in range(3):
                lite.all_reduce(torch.ones(2))
        found["together"] = stream.text
    with lite_of(report_after_s=0) as lite:
        lite.launch()
        assert {thread.name for thread in set(threading.enumerate()) - threads} == {"plugframe-alarm"}
    assert set(threading.enumerate()) == threads
    return found


@pytest.fixture(scope="module")
def written() -> list[dict[str, str]]:
    return run_ranks(2, on_a_rank)


def test_a_job_goes_on_after_it_was_told_who_is_waited_for(written: list[dict[str, str]]) -> None:
    """The waiting rank prints a line with the position of both ranks after report_after_s; the job then continues."""
    line = written[0]["barrier"]
    assert "plugframe: still waiting for rank 1 after 0." in line
    assert "rank 0 waits in barrier (test_slow_collective.py:" in line
    assert "rank 1 is in validate (test_slow_collective.py:" in line
    assert written[1]["barrier"] == ""


def test_gradients_that_are_waited_for_are_told_of(written: list[dict[str, str]]) -> None:
    """A rank that averages gradients in backward reports a rank that is still in forward."""
    line = written[0]["backward"]
    assert "rank 0 waits in backward (test_slow_collective.py:" in line
    assert "rank 1 is in validate (test_slow_collective.py:" in line
    assert "in forward" in line


def test_what_rank_0_does_first_is_told_of_by_the_others(written: list[dict[str, str]]) -> None:
    """Ranks that wait in rank_zero_first report rank 0's position, without an error."""
    assert "rank 1 waits in rank_zero_first (test_slow_collective.py:" in written[1]["first"]
    assert "rank 0 is in validate (test_slow_collective.py:" in written[1]["first"]
    assert [each["together"] for each in written] == ["", ""]
