"""Hang detection: collect the status of every rank when a collective times out, and report it in one error."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any

from plugframe.diagnostics.call_log import CallLog, site
from plugframe.diagnostics.rank_status import RankStatus, diagnose
from plugframe.errors import CollectiveTimeoutError, RankLostError
from plugframe.hooks.context import Context
from plugframe.utils.lost_rank import LATE_TEXTS, LOST_TEXTS, NETWORK_TYPES
from plugframe.utils.stores import fresh_prefix

#: How long to wait for responses: after a timeout, and after a lost connection, when the rank has often died.
TIMEOUT_RESPONSE_S, LOST_RESPONSE_S = 5.0, 2.0
_POLL_S = 0.01
#: An alarm within the last seconds is reused instead of raising another one.
_ALARM_REUSE_S = 10.0
_FOREVER = timedelta(days=1000)
#: How long to wait for the thread at tear-down, in seconds: on a busy machine the store's server takes its time.
_JOIN_S = 10.0
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_INSTRUMENT = os.path.join(_PACKAGE, "diagnostics", "instrument.py")
_RANK = os.path.join(_PACKAGE, "launch", "rank.py")
#: Activity of a rank, by the function of this package that calls the user's code or waits for it.
_ACTIVITIES = {
    (os.path.join("adopt", "module.py"), "run"): "forward",
    (os.path.join("data", "loader.py"), "_batches"): "reading a batch",
}


class HangReporter:
    """Thread that reports the status of its rank, and collects the status of all ranks.

    The thread blocks on its own connection to the ranks' store: it costs nothing until it is woken, and responds even
    while the rank's main thread hangs.
    """

    def __init__(self, context: Context, log: CallLog) -> None:
        self._rank, self._size = context.world.global_rank, context.world.world_size
        self._log = log
        self._owner = threading.get_ident()
        self._channel: _StatusChannel | None = None
        self._closed = False
        group = context.hooks.collective_process_group()
        store: Any = group.get_group_store() if hasattr(group, "get_group_store") else None
        if hasattr(store, "clone"):
            # A job may be set up more than once over one store, because the user's own process group stays.
            prefix = fresh_prefix(store, "alarm", self._rank)
            self._channel = _StatusChannel(store, prefix, self._rank, self._size, self.status)
            self._channel.start()

    def explain(self, error: BaseException, *, late: bool = False) -> Exception | None:
        """Return an error with the status of every rank, None if `error` is not about missing ranks.

        Args:
            late: whether `error` is known to be a timeout.
        """
        if self._closed or isinstance(error, RankLostError):
            return None
        text = str(error)
        late = late or any(part in text for part in LATE_TEXTS)
        types = {kind.__name__ for kind in type(error).__mro__}
        if not (late or NETWORK_TYPES & types or any(part in text for part in LOST_TEXTS)):
            return None
        waited_s = self._log.waited_s()
        mine = self.status(own=True)
        seconds = TIMEOUT_RESPONSE_S if late else LOST_RESPONSE_S
        statuses: dict[int, RankStatus | None] = dict.fromkeys(range(self._size))
        if self._channel is not None:
            statuses.update(self._channel.collect(seconds))
        statuses[self._rank] = mine
        found = diagnose(statuses, self._rank, seconds=seconds)
        head = _head(mine, found.culprit, waited_s, late=late)
        culprit = statuses[found.culprit] if found.culprit is not None else None
        blamed = None
        if found.culprit is not None:
            host = culprit.host if culprit is not None else ""
            stack = culprit.stack if culprit is not None else ""
            alive = late and culprit is not None and not culprit.shut_down
            blamed = {"rank": found.culprit, "host": host, "stack": stack, "alive": alive, "text": found.text}
        stack = f"\nStack of rank {found.culprit}:\n{blamed['stack']}" if blamed and blamed["stack"] else ""
        kind = CollectiveTimeoutError if late else RankLostError
        return kind(f"{head}: {found.text}{stack}", blamed=blamed)

    def collect(self, occasion: str) -> dict[int, RankStatus | None]:
        """Return the status of every rank; empty if another rank does so for this `occasion`, or without a store."""
        channel = self._channel
        if channel is None or not channel.claim(occasion):
            return {}
        statuses: dict[int, RankStatus | None] = dict.fromkeys(range(self._size))
        statuses.update(channel.collect(TIMEOUT_RESPONSE_S, is_check=True))
        statuses[self._rank] = self.status()
        return statuses

    def status(self, *, own: bool = False, error: str = "", shut_down: bool = False) -> RankStatus:
        """Return the status of this rank."""
        frame = sys._current_frames().get(self._owner) if not own else sys._getframe(1)
        running, last = self._log.running(), self._log.last()
        activity, stack = _where(frame, self._log)
        return RankStatus(
            rank=self._rank,
            host=socket.gethostname(),
            running=None if shut_down else running,
            waited_s=0.0 if shut_down else self._log.waited_s(),
            last=last,
            activity=activity,
            stack="" if shut_down else stack,
            shut_down=shut_down,
            error=error,
        )

    def close(self) -> None:
        """Publish that this rank shuts down, and with which error; stop the thread. Does not wait for others."""
        channel, self._channel, self._closed = self._channel, None, True
        if channel is not None:
            error = sys.exc_info()[1]
            summary = (
                traceback.format_exception_only(type(error), error)[0].splitlines()[0] if error is not None else ""
            )
            channel.close(self.status(own=True, error=summary, shut_down=True))


def _head(mine: RankStatus, culprit: int | None, waited_s: float, *, late: bool) -> str:
    if mine.running is None:
        return f"A collective {mine.activity} timed out"
    call = mine.running.text
    if late and mine.running.peer is not None:
        return f"{call} got no {mine.running.counterpart} on rank {mine.running.peer} within {waited_s:.3g} s"
    if culprit == mine.rank:
        return f"The ranks make different calls ({call} has waited for {waited_s:.3g} s)"
    if culprit is None:
        return f"{call} did not complete within {waited_s:.3g} s" if late else f"{call} lost the connection to a rank"
    if late:
        return f"Rank {culprit} did not reach {call} within {waited_s:.3g} s"
    return f"{call} lost the connection to rank {culprit}"


def _where(frame: FrameType | None, log: CallLog) -> tuple[str, str]:
    """Return the activity of a rank, ``"in forward (model.py:31)"``, and its stack from the user's code on."""
    if frame is None:
        return "", ""
    frames = [each for each, _ in traceback.walk_stack(frame)]
    users = next((each for each in frames if log.is_users(each)), None)
    activities = (
        _ACTIVITIES.get((each.f_code.co_filename[len(_PACKAGE) :], each.f_code.co_name), "")
        for each in frames
        if each.f_code.co_filename.startswith(_PACKAGE)
    )
    outer = next(filter(None, activities), "")
    if users is None:
        return (f"in {outer}" if outer else ""), ""
    name, place = users.f_code.co_name, site(users.f_code.co_filename, users.f_lineno)
    activity = f"at {place}" if name.startswith("<") else f"in {name} ({place})"
    if outer and outer != name:
        activity += f", {outer}" if " " in outer else f", in {outer}"
    return activity, _user_stack(frames, log)


def _user_stack(frames: list[FrameType], log: CallLog) -> str:
    """Return a stack from the first frame of the user's code to the first of the call log."""
    lines = list(traceback.extract_stack(frames[0]))
    users = [log.is_users(each) and not each.f_code.co_filename.startswith("<") for each in reversed(frames)]
    # A forked rank has the frames of the launcher below those of the script, the command itself among them.
    launched = max((number for number, line in enumerate(lines) if line.filename == _RANK), default=-1)
    first = users.index(True, launched + 1) if True in users[launched + 1 :] else 0
    last = next((number for number, line in enumerate(lines) if line.filename == _INSTRUMENT), len(lines))
    return "".join(traceback.format_list(lines[first:last])).rstrip()


class _StatusChannel:
    """Connections of a rank to the store: the thread blocks on one, and other threads send requests on the other."""

    def __init__(self, store: Any, prefix: str, rank: int, size: int, status: Callable[[], RankStatus]) -> None:
        self._receiver, self._sender = store.clone(), store.clone()
        self._prefix, self._rank, self._size = prefix, rank, size
        self._status = status
        self._turn, self._alarm_time = 0, 0.0
        self._closing = False
        self._shut_down: dict[int, RankStatus] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._listen, name="plugframe-alarm", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def claim(self, occasion: str) -> bool:
        """Return whether this rank is the first to claim `occasion`."""
        if self._closed or self._closing:
            return False
        try:
            first = self._sender.compare_set(self._key("occasion", occasion), "", str(self._rank))
        except RuntimeError:  # the store is gone
            return False
        return bool(first.decode() == str(self._rank))

    def collect(self, seconds: float, *, is_check: bool = False) -> dict[int, RankStatus]:
        """Request the status of every rank, and return the responses received within `seconds`.

        Args:
            is_check: whether nothing has failed yet: a later alarm then sends a new request.
        """
        if self._closed:
            return dict(self._shut_down)
        try:
            turn = self._turn
            if is_check or turn == 0 or time.monotonic() - self._alarm_time > _ALARM_REUSE_S:
                turn += 1
                if self._sender.compare_set(self._key("alarm", turn), "", str(self._rank)).decode() == str(self._rank):
                    message = json.dumps({"message": "collect" if is_check else "alarm"})
                    keys = [self._key("to", rank, turn) for rank in range(self._size)]
                    self._sender.multi_set(keys, [message] * self._size)
            return self._responses(turn, seconds)
        except RuntimeError:  # the store is gone, with the rank or the launcher that served it
            return dict(self._shut_down)

    def _responses(self, turn: int, seconds: float) -> dict[int, RankStatus]:
        found: dict[int, RankStatus] = {}
        until = time.monotonic() + seconds
        while len(found) < self._size - 1:
            for rank in range(self._size):
                if rank == self._rank or rank in found:
                    continue
                for key in (self._key("shut_down", rank), self._key("answer", turn, rank)):
                    if self._sender.check([key]):
                        found[rank] = RankStatus.from_dict(json.loads(self._sender.get(key)))
                        break
            if time.monotonic() > until or self._closed or self._closing:
                break
            time.sleep(_POLL_S)
        return {**self._shut_down, **found}

    def close(self, final: RankStatus) -> None:
        """Publish the final status and stop the thread. Rank 0, which may serve the store, stops all ranks' threads."""
        self._closing = True
        if not self._closed:
            message = json.dumps({"message": "shut_down", "status": final.as_dict()})
            to = range(self._size) if self._rank == 0 else (self._rank,)
            # The last request makes sure that the server has answered the waiting ranks before it may end.
            with contextlib.suppress(RuntimeError):
                self._sender.set(self._key("shut_down", self._rank), json.dumps(final.as_dict()))
                for turn in (self._turn + 1, self._turn + 2):
                    self._sender.multi_set([self._key("to", rank, turn) for rank in to], [message] * len(to))
                self._sender.check([self._key("shut_down", self._rank)])
        self._thread.join(_JOIN_S)  # what the thread refers to, process groups too, stays until it ends

    def _listen(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone
            while not self._closing:
                key = self._key("to", self._rank, self._turn + 1)
                self._receiver.wait([key], _FOREVER)
                request = json.loads(self._receiver.get(key))
                if request["message"] != "collect":
                    self._alarm_time = time.monotonic()
                self._turn += 1
                if request["message"] == "shut_down":
                    status = RankStatus.from_dict(request["status"])
                    self._shut_down[status.rank] = status
                    break
                self._receiver.set(self._key("answer", self._turn, self._rank), json.dumps(self._status().as_dict()))
        self._closed = True

    def _key(self, *parts: object) -> str:
        return "/".join([self._prefix, *map(str, parts)])
