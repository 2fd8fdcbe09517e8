"""Sends and receives in the call log, in hang reports and under lockstep: calls of two ranks, not of all."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from plugframe import Lite, PlugframeError
from plugframe.base import Extension
from plugframe.diagnostics import messages
from plugframe.diagnostics.call_log import Call, CallLog
from plugframe.diagnostics.instrument import RECORDED_HOOKS, record
from plugframe.diagnostics.rank_status import RankStatus, diagnose
from plugframe.diagnostics.stall_report import report
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from ranks import rank_store, run_ranks


def call(kind: str, peer: int | None = None, number: int = 4) -> Call:
    what = "" if peer is None else f"{'dst' if kind == 'send' else 'src'}={peer} tag=0"
    return Call(number, f"collective_{kind}", kind, what, "train.py", 57, False, peer)


def statuses(*calls: Call | None, **more: Any) -> dict[int, RankStatus | None]:
    """Return the status of ranks in these calls, or in forward."""
    return {
        rank: RankStatus(
            rank=rank, host="here", running=each, activity="" if each else "in forward (model.py:31)", **more
        )
        for rank, each in enumerate(calls)
    }


# ---------------------------------------------------------------------- which rank is waited for


@pytest.mark.parametrize(
    ("calls", "culprit", "says"),
    [
        ([call("send", 2), None, None], 2, "rank 0 waits in send of dst=2 tag=0 (train.py:57, call 4)"),
        ([call("recv", 1), call("recv", 2), None], 2, "rank 2 is in forward (model.py:31)"),
        ([call("send", 1), call("recv", 0), None], None, "Both ranks are in the message: check the network"),
        (
            [call("send", 1), replace(call("recv", 0), what="src=0 tag=0 in a group")],
            1,
            "Ranks 0 and 1 wait for each other: give the send and its recv one group.",
        ),
        ([call("send", 1), call("send", 0), None], 1, "Ranks 0 and 1 wait for each other: let one receive first"),
        (
            [call("send", 1), call("send", 2), call("send", 0)],
            1,
            "Ranks 0-2 wait for each other: let one receive first, or use all_to_all.",
        ),
        (
            [call("send", 1), call("all_reduce", number=5), call("all_reduce", number=5)],
            1,
            "Rank 1 calls all_reduce and no recv for rank 0: each send needs a recv.",
        ),
        ([call("recv", 1), call("send", 2), call("barrier")], 2, "Rank 2 calls barrier and no recv for rank 1"),
        (
            [call("all_reduce"), call("recv", 2), call("all_reduce")],
            1,
            "Rank 2 calls all_reduce and no send for rank 1",
        ),
    ],
)
def test_who_a_message_waits_for_is_found(calls: list[Call | None], culprit: int | None, says: str) -> None:
    """The other rank of the message is waited for, not any rank that is elsewhere, and its own message is followed."""
    found = diagnose(statuses(*calls), 0, seconds=5.0)
    assert found.culprit == culprit
    assert says in found.text


def test_a_rank_that_ended_without_its_recv_is_named() -> None:
    """A rank that has shut down is named with its error, without advice about messages."""
    given = statuses(call("send", 1), None)
    given[1] = RankStatus(rank=1, host="here", shut_down=True, error="ValueError: no")
    found = diagnose(given, 0, seconds=5.0)
    assert (found.culprit, found.text.endswith("rank 1 has shut down with ValueError: no.")) == (1, True)


def test_a_rank_that_does_not_respond_is_the_end_of_a_chain() -> None:
    """Without a status of the other rank it is the one that is waited for."""
    found = diagnose({0: statuses(call("recv", 1))[0], 1: None}, 0, seconds=5.0)
    assert found.culprit == 1
    assert "rank 1 did not respond within 5 s" in found.text


def test_ranks_that_wait_for_each_other_are_reported_while_they_wait() -> None:
    """The line of a long wait names both; two ranks in one message have none."""
    text = report(statuses(call("recv", 1), call("recv", 0)), 0, 31.0)
    assert text.endswith("Ranks 0 and 1 wait for each other: let one send first.")
    assert text.startswith("plugframe: still waiting for rank 1 after 31 s: rank 0 waits in recv of src=1 tag=0")
    assert report(statuses(call("send", 1), call("recv", 0)), 0, 31.0) == ""


def test_a_call_of_no_message_has_no_hint() -> None:
    """Ranks in other calls get the hints of those."""
    assert messages.hint({0: call("barrier"), 1: None}) == ""


# ---------------------------------------------------------------------- what is recorded


def recorded(name: str, **arguments: Any) -> tuple[CallLog, Call]:
    log = CallLog()
    hooks = SimpleNamespace(**{hook: lambda **arguments: None for hook in RECORDED_HOOKS})
    record(hooks, log, lambda error, late: None)
    getattr(hooks, f"collective_{name}")(**{"group": None, **arguments})
    last = log.last()
    assert last is not None
    return log, last


@pytest.mark.parametrize(
    ("name", "arguments", "what", "count", "peer"),
    [
        ("send", {"tensor": torch.ones(3), "dst": 1, "tag": 7}, "(3,) float32 dst=1 tag=7", 0, 1),
        ("recv", {"tensor": torch.ones(3), "src": 2, "tag": 0}, "(3,) float32 src=2 tag=0", 0, 2),
        (
            "recv",
            {"tensor": torch.ones(3), "src": 2, "tag": 0, "group": 1},
            "(3,) float32 src=2 tag=0 in a group",
            0,
            2,
        ),
        ("all_to_all", {"tensor": torch.ones(2, 3), "input_sizes": None}, "(2, 3) float32", 1, None),
        ("all_to_all", {"tensor": torch.ones(5, 3), "input_sizes": [2, 3]}, "(*, 3) float32", 1, None),
        ("all_to_all", {"tensor": torch.ones(2), "input_sizes": None, "group": "half"}, "(2,) float32", 0, None),
        ("scatter", {"tensor": torch.ones(2, 3), "src": 1}, "float32 src=1", 1, None),
        ("gather_object", {"obj": 1, "dst": 1}, "dst=1", 1, None),
    ],
)
def test_calls_are_recorded_with_what_is_equal_on_their_ranks(
    name: str, arguments: dict[str, Any], what: str, count: int, peer: int | None
) -> None:
    """What may differ between ranks is left out; messages do not count as calls of all ranks."""
    log, last = recorded(name, **arguments)
    assert (last.what, log.count, last.peer) == (what, count, peer)


# ---------------------------------------------------------------------- on two ranks


class Hooks(Extension):
    """Keeps the hooks of the job, as a strategy does."""

    hooks: Any

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self.hooks = context.hooks


def lite_of(*plugins: Any, timeout_s: float) -> Any:
    return Lite(accelerator="cpu", devices=2, strategy="ddp", timeout_s=timeout_s, plugins=plugins)


def failure(call: Any) -> str:
    try:
        return f"returned {call()!r}"
    except PlugframeError as error:
        return f"{type(error).__name__}: {error}"


def on_a_rank(world: World) -> dict[str, str]:
    """Send without a recv, and send where the other rank makes a call of all ranks; return this rank's errors."""
    rank, store, found = world.global_rank, rank_store(60.0), {}
    for name in ("elsewhere", "all_reduce"):
        kept = Hooks()
        with lite_of(kept, timeout_s=1.0) as lite:
            lite.launch()
            message = {"tensor": torch.ones(3), "tag": 2, "group": None}
            if rank == 0:
                found[name] = failure(lambda: kept.hooks.collective_send(dst=1, **message))  # noqa: B023
                store.set(name, "over")
            elif name == "elsewhere":
                store.wait([name])
            else:
                found[name] = failure(lambda: lite.all_reduce(torch.ones(2)))
                store.wait([name])
    kept = Hooks()
    with lite_of(kept, "lockstep", timeout_s=30.0) as lite:
        lite.launch()
        found["lockstep"] = lockstep(kept.hooks, rank)
        found["reduced"] = str(lite.all_reduce(torch.ones(2), reduce_op="sum").tolist())
        found["different"] = failure(lambda: different(kept.hooks, rank))
    return found


def lockstep(hooks: Any, rank: int) -> str:
    """Make calls that legitimately differ on the ranks."""
    x = torch.arange(3.0)
    for tag in range(3):
        if rank == 0:
            hooks.collective_send(tensor=x, dst=1, tag=tag, group=None)
        else:
            hooks.collective_recv(tensor=x, src=0, tag=tag, group=None)
        if tag == 1 and rank == 1:  # one more message in the other direction
            hooks.collective_send(tensor=x, dst=0, tag=9, group=None)
        elif tag == 1:
            hooks.collective_recv(tensor=x, src=1, tag=9, group=None)
    sizes = [[0, 2], [3, 1]]
    rows = hooks.collective_all_to_all(
        tensor=torch.ones(sum(sizes[rank]), 2),
        output_sizes=[sizes[0][rank], sizes[1][rank]],
        input_sizes=sizes[rank],
        group=None,
        sync_grads=False,
    )
    row = hooks.collective_scatter(tensor=torch.ones(2, 4) if rank == 0 else torch.empty(4), src=0, group=None)
    return f"{tuple(rows.shape)} {tuple(row.shape)} {hooks.collective_gather_object(obj=rank, dst=1, group=None)}"


def different(hooks: Any, rank: int) -> Any:
    if rank == 0:
        return hooks.collective_gather_object(obj=1, dst=0, group=None)
    return hooks.collective_scatter(tensor=torch.ones(2, 2), src=1, group=None)


@lru_cache(maxsize=1)
def told() -> list[dict[str, str]]:
    return run_ranks(2, on_a_rank)


def test_a_send_without_its_recv_names_the_rank_that_should_receive() -> None:
    """The error has the message, its line, and what the other rank does instead."""
    text = told()[0]["elsewhere"]
    assert text.startswith("CollectiveTimeoutError: send of (3,) float32 dst=1 tag=2 (test_messages.py:"), text
    assert "got no recv on rank 1 within 1" in text
    assert "rank 1 is in on_a_rank (test_messages.py:" in text
    assert "Stack of rank 1:" in text


def test_a_send_beside_a_call_of_all_ranks_is_explained_on_both() -> None:
    """Whichever rank times out first says that a send has no recv."""
    errors = [each["all_reduce"] for each in told()]
    assert all(text.startswith(("CollectiveTimeoutError", "RankLostError")) for text in errors), errors
    assert any("calls all_reduce and no recv for rank 0: each send needs a recv." in text for text in errors), errors


def test_lockstep_lets_messages_differ_and_compares_the_rest() -> None:
    """Messages do not disturb the calls that all ranks make; different ones of those are an error that lists them."""
    first, second = told()
    assert (first["lockstep"], second["lockstep"]) == ("(3, 2) (4,) None", "(3, 2) (4,) [0, 1]")
    assert first["reduced"] == second["reduced"] == "[2.0, 2.0]"
    for text in (first["different"], second["different"]):
        assert text.startswith("CollectiveMismatchError: The ranks do not make the same call: rank 0: gather_object of")
        assert "rank 1: scatter of float32 src=1" in text
