"""Diverging ranks: every rank gets an error with the status of all, never a wrong value or an abort."""

from __future__ import annotations

import linecache
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

import warm
from divergence_mistakes import MISTAKES, marked, run_all
from plugframe import CollectiveTimeoutError, Lite, PlugframeError, RankLostError, SettingError
from plugframe.diagnostics import likely_causes
from plugframe.diagnostics.call_log import END, SIZE, Call, CallLog
from plugframe.diagnostics.instrument import call_log_of
from plugframe.diagnostics.rank_status import RankStatus, diagnose
from plugframe.hooks.world import World
from plugframe.launch.report import RankExit, report
from ranks import rank_store, run_ranks

# ---------------------------------------------------------------------- the ring


def wrapped(ring: CallLog, hook: str, tensor: Any = None, detail: Any = None, everyone: bool = True) -> Any:
    return ring.begin(hook, tensor, detail, everyone)


def test_a_ring_knows_the_line_a_call_comes_from() -> None:
    """An entry has number, operation, tensor and the user's line; text is formatted on request."""
    ring = CallLog()
    entry = wrapped(ring, "collective_all_reduce", torch.ones(2, 3), "sum")
    running = ring.running()
    assert running is not None
    assert 'entry = wrapped(ring, "collective_all_reduce"' in linecache.getline(__file__, running.line)
    assert running.text == f"all_reduce of (2, 3) float32 sum (test_divergence.py:{running.line}, call 1)"
    entry[END] = True
    assert ring.running() is None
    last = ring.last()
    assert last is not None
    assert last.done


def test_a_ring_keeps_the_last_calls_and_counts_those_of_all_ranks() -> None:
    """The oldest entries are dropped; calls of a group are not counted."""
    ring = CallLog()
    for _ in range(SIZE + 5):
        wrapped(ring, "collective_barrier")[END] = True
    wrapped(ring, "collective_barrier", everyone=False)
    assert len(ring.calls()) == SIZE
    assert ring.count == SIZE + 5
    assert [call.number for call in ring.calls(2)] == [SIZE + 5, SIZE + 5]


# ---------------------------------------------------------------------- which mistake it is


@pytest.fixture
def source(tmp_path: Path) -> Callable[[str], Callable[[int], Call]]:
    """Write a script; return a function that makes a call at one of its lines."""

    def write(body: str) -> Callable[[int], Call]:
        path = tmp_path / "train.py"
        path.write_text(textwrap.dedent(body).lstrip())
        linecache.checkcache()
        return lambda line: Call(1, "collective_all_reduce", "all_reduce", "", str(path), line, False)

    return write


def test_conditions_loops_and_handlers_are_found_in_the_source(source: Any) -> None:
    """Rank conditions, handlers that swallow errors, and loops that one of two calls has left are found."""
    at = source(
        """
        for batch in loader:
            if lite.is_global_zero:
                lite.all_reduce(x)
            elif other:
                lite.barrier()
            try:
                lite.backward(loss)
            except (ValueError, KeyError):
                continue
            try:
                lite.backward(loss)
            except ValueError:
                raise
        lite.save(path, state)
        """
    )
    assert likely_causes.under_rank_condition(at(3)) == "'if lite.is_global_zero:' (train.py:2)"
    assert likely_causes.under_rank_condition(at(5)) == "else of 'if lite.is_global_zero:' (train.py:2)"
    assert likely_causes.under_rank_condition(at(14)) == ""
    assert likely_causes.under_swallowing(at(7)) == "'except (ValueError, KeyError):' (train.py:8)"
    assert likely_causes.under_swallowing(at(11)) == ""
    assert likely_causes.in_loop(at(11)) == "'for batch in loader:' (train.py:1)"
    assert likely_causes.loop_left(at(7), at(14)) == "'for batch in loader:' (train.py:1)"
    assert likely_causes.loop_left(at(14), at(7)) == ""


def test_code_that_cannot_be_read_gives_no_hint() -> None:
    """Calls in unreadable source (a prompt, a broken file) have no hint."""
    call = Call(1, "collective_barrier", "barrier", "", "<stdin>", 3, False)
    assert likely_causes.source(call) == likely_causes.under_rank_condition(call) == likely_causes.in_loop(call) == ""


def status(rank: int, number: int | None, **more: Any) -> RankStatus:
    call = None if number is None else Call(number, "collective_barrier", "barrier", "", "train.py", 57, False)
    return RankStatus(rank=rank, host="here", running=call, **more)


@pytest.mark.parametrize(
    ("others", "culprit", "says"),
    [
        ([status(1, None, activity="in forward (model.py:31)")], 1, "rank 1 is in forward (model.py:31)"),
        (
            [status(1, 8), status(2, None, activity="at train.py:3")],
            2,
            "ranks 0 and 1 wait in barrier (train.py:57, call 8)",
        ),
        ([status(1, 7), status(2, 8)], 1, "rank 1 waits in barrier (train.py:57, call 7)"),
        ([None, status(2, 8)], 1, "rank 1 did not respond within 5 s (it died, is stopped, or a thread holds the GIL)"),
        ([status(1, None, shut_down=True, error="ValueError: no")], 1, "rank 1 has shut down with ValueError: no"),
        ([status(1, 8), status(2, 8)], None, "All ranks are in the same call: check the network and the devices."),
    ],
)
def test_the_rank_that_did_not_come_is_found(others: list[RankStatus | None], culprit: int | None, says: str) -> None:
    """The culprit has shut down or does not respond, else is in no call, else is in another call than most."""
    statuses = dict(enumerate([status(0, 8), *others]))
    found = diagnose(statuses, 0, seconds=5.0)
    assert found.culprit == culprit
    assert says in found.text


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_names_the_cause(source: Any, rank: int) -> None:
    """The rank that is under a condition does, and the one that makes another call."""
    at = source(
        """
        for batch in loader:
            lite.backward(loss)
            if lite.is_global_zero:
                lite.save(path, state)
        """
    )
    calls = [replace(at(4), name="save"), replace(at(2), name="backward", hook="strategy_backward")]
    statuses = {number: RankStatus(rank=number, host="here", running=call) for number, call in enumerate(calls)}
    found = diagnose(statuses, rank, seconds=5.0)
    assert found.culprit == 1
    assert "save is under 'if lite.is_global_zero:' (train.py:3), so that not every rank calls it" in found.text


def test_the_launcher_blames_the_rank_that_did_not_come() -> None:
    """The report names the rank that a timed-out rank blames, with its stack."""
    blamed = {
        "rank": 1,
        "host": "there",
        "text": "rank 1 is in forward (model.py:31).",
        "stack": "  File",
        "alive": True,
    }
    message = {"message": "CollectiveTimeoutError: Rank 1 did not reach barrier", "extraInfo": {"py_callstack": "…"}}
    words = {"types": ["CollectiveTimeoutError", "RankLostError"], "exit_code": 1, "message": message, "blamed": blamed}
    told = report([RankExit(rank=0, exit_code=1, time=1.0, error=words), RankExit(rank=1, exit_code=-15)], host="here")
    first, *rest = told.text.splitlines()
    assert first == "rank 1 on there did not reach a collective: rank 1 is in forward (model.py:31)."
    assert rest == [
        "Stack of rank 1:",
        "  File",
        "rank 0: CollectiveTimeoutError: Rank 1 did not reach barrier (a consequence)",
    ]
    assert told.certain


# ---------------------------------------------------------------------- on two ranks


def lite_of(timeout_s: float, **settings: Any) -> Lite:
    return Lite(accelerator="cpu", devices=2, strategy="ddp", timeout_s=timeout_s, **settings)


def failure(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        return "", repr(call())
    except PlugframeError as error:
        return type(error).__name__, str(error)


class Waiting:
    """Keeps a rank elsewhere until rank 0 has its result."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def forward(self, name: str) -> None:
        self.store.wait([name])


def checks_of_a_rank(world: World) -> dict[str, Any]:
    """Run all checks that fit in one start; return the errors of this rank."""
    store, found = rank_store(60.0), {}
    threads = set(threading.enumerate())
    with Lite(accelerator="cpu", devices=2, strategy="ddp", diagnostics=False) as lite:
        lite.launch()
        # Nothing is recorded, compared or waited for: what is called is the plugin's own method.
        assert set(threading.enumerate()) == threads
        assert call_log_of(lite._hooks) is None
        assert lite._hooks.collective_all_reduce.__self__ is lite._session.plugins["collective"]
        assert lite.all_reduce(1.0) == 1.0
    with lite_of(1.0) as lite:
        lite.launch()
        assert {thread.name for thread in set(threading.enumerate()) - threads} == {"plugframe-alarm"}
        lite.barrier()
        if world.global_rank == 0:
            found["late"] = failure(lambda: lite.barrier("mine"))
            store.set("late", "over")
        else:
            Waiting(store).forward("late")
    with lite_of(30.0) as lite:
        lite.launch()
        found["gathered"] = lite.all_gather(torch.arange(2.0 + lite.global_rank), pad=-1.0).tolist()
        found["unequal"] = failure(lambda: lite.all_gather(torch.arange(2.0 + lite.global_rank)))
        found["dimensions"] = failure(lambda: lite.all_gather(torch.ones((1,) * (1 + lite.global_rank)), pad=0.0))
        if world.global_rank == 0:
            found["per call"] = failure(lambda: lite.all_reduce(torch.ones(2), timeout_s=0.3))
            store.set("per call", "over")
        else:
            Waiting(store).forward("per call")
            lite._hooks.collective_monitored_barrier(name="late", timeout_s=20.0)  # matches the earlier one
        found["sum after it"] = lite.all_reduce(torch.ones(2), reduce_op="sum").tolist()
        found["in time"] = [
            lite.broadcast(7, timeout_s=20.0),
            lite.all_gather(1, timeout_s=20.0).tolist(),
            lite.barrier(timeout_s=20.0),
        ]
        with pytest.raises(SettingError, match=r"all_reduce\(timeout_s=-1\): it is a number of seconds above 0"):
            lite.all_reduce(1, timeout_s=-1)
    store.set(f"pid{world.global_rank}", str(os.getpid()))
    with lite_of(1.0) as lite:
        lite.launch()
        stopped(lite, store, found)
    assert set(threading.enumerate()) == threads
    return found


def stopped(lite: Any, store: Any, found: dict[str, Any]) -> None:
    """Stop the process of rank 1 while rank 0 waits for it."""
    if lite.global_rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    found["stopped"] = failure(lite.barrier)
    os.kill(int(store.get("pid1")), signal.SIGCONT)


@lru_cache(maxsize=1)
def told() -> list[dict[str, Any]]:
    return run_ranks(2, checks_of_a_rank)


@lru_cache(maxsize=1)
def told_of_mistakes() -> list[dict[str, tuple[str, str, float]]]:
    return run_ranks(2, run_all, (), 2.0)


def test_a_rank_that_does_not_come_is_named_with_its_line_and_stack() -> None:
    """A timeout error has each rank's position and last call, and the stack of the missing rank."""
    kind, text = told()[0]["late"]
    assert kind == "CollectiveTimeoutError"
    assert "Rank 1 did not reach barrier (test_divergence.py:" in text
    assert "rank 1 is in forward (test_divergence.py:" in text
    assert "its last collective was barrier (test_divergence.py:" in text
    assert "Stack of rank 1:" in text
    assert "self.store.wait([name])" in text


def test_unequal_shapes_are_listed_or_padded() -> None:
    """all_gather of unequal shapes raises on all ranks with a list of shapes, or pads if asked to."""
    for found in told():
        assert found["gathered"] == [[0.0, 1.0, -1.0], [0.0, 1.0, 2.0]]
        kind, text = found["unequal"]
        assert kind == "CollectiveMismatchError"
        assert "rank 0: all_gather of (2,) float32" in text
        assert "rank 1: all_gather of (3,) float32" in text
        assert found["dimensions"][0] == "CollectiveMismatchError"


def test_a_call_can_have_a_timeout_of_its_own() -> None:
    """A timeout per call applies to that call only; connections stay usable."""
    kind, text = told()[0]["per call"]
    assert kind == "CollectiveTimeoutError"
    assert "rank 1 is in forward" in text
    for found in told():
        assert found["sum after it"] == [2.0, 2.0]
        assert found["in time"] == [7, [1, 1], None]


def test_a_rank_that_cannot_answer_is_said_to_be_so() -> None:
    """A stopped process, or one that holds the GIL, is reported as not responding."""
    kind, text = told()[0]["stopped"]
    assert kind == "CollectiveTimeoutError"
    assert "rank 1 did not respond within 5 s" in text


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda function: function.__name__)
def test_without_lockstep_nothing_aborts_and_what_can_corrupt_is_named(mistake: Any) -> None:
    """Different calls raise on at least one rank; only two equal calls in another order are not detected."""
    found = [report_of[mistake.__name__] for report_of in told_of_mistakes()]
    texts = [text for kind, text, _ in found if kind]
    if mistake.__name__ == "the_order_differs":
        assert texts == []
        return
    assert {kind for kind, _, _ in found if kind} <= {
        "CollectiveMismatchError",
        "CollectiveTimeoutError",
        "RankLostError",
    }
    assert any("rank 0" in text and "rank 1" in text for text in texts)
    if any(kind != "CollectiveMismatchError" for kind, _, _ in found if kind):
        assert any(site in text for text in texts for site in marked(mistake, 0))


def test_one_rank_has_no_ring() -> None:
    """With one rank nothing is recorded, and hooks are the plugins' own methods."""
    with Lite(accelerator="cpu", devices=1) as lite:
        lite.launch()
        assert call_log_of(lite._hooks) is None
        assert lite._hooks.collective_all_reduce.__self__ is lite._session.plugins["collective"]


def test_errors_travel_between_processes() -> None:
    """Timeout errors can be pickled, with the rank they blame."""
    import pickle

    error = pickle.loads(pickle.dumps(CollectiveTimeoutError("late", blamed={"rank": 1})))
    assert (str(error), error.blamed) == ("late", {"rank": 1})
    assert isinstance(error, TimeoutError)
    assert isinstance(error, RankLostError)


SCRIPT = """
import os, sys, time
import torch
from plugframe import Lite

lite = Lite(accelerator="cpu", devices=2, strategy="ddp", timeout_s=1.0)
lite.launch()


class Model(torch.nn.Module):
    def forward(self, x):
        time.sleep(300)


model = lite.setup(Model())
if lite.global_rank == 1:
    model(torch.ones(1))
lite.all_reduce(torch.ones(2))
"""


def test_plugframe_run_blames_the_rank_that_hangs(tmp_path: Path) -> None:
    """The launcher's report starts with the missing rank, its line and its stack, once."""
    (tmp_path / "train.py").write_text(SCRIPT)
    # As the installed command is: a file of its own, whose frame is not the script's.
    (tmp_path / "command.py").write_text("from plugframe.cli import main\nmain()\n")
    done = warm.run(
        [sys.executable, "command.py", "run", "train.py", "--devices=2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not line.startswith("plugframe: ddp on 2")]
    assert "did not reach a collective: rank 0 waits in all_reduce of (2,) float32 mean (train.py:18, call" in lines[0]
    assert lines[0].startswith("rank 1 on ")
    assert "rank 1 is in forward (train.py:12), its last collective was setup (train.py:15, call" in lines[0]
    assert lines[1] == "Stack of rank 1:"
    assert 'train.py", line 17, in <module>' in lines[2]
    assert "line 12, in forward" in done.stderr
    assert "Traceback" not in done.stderr
    assert lines[-1].startswith("rank 0: ")
    assert lines[-1].endswith("(a consequence)")
