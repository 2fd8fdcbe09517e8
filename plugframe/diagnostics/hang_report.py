"""When an exchange times out: every rank is asked where it is, and one error says what all have answered."""

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
from plugframe.diagnostics.rank_status import Account, find
from plugframe.errors import CollectiveTimeoutError, RankLostError
from plugframe.hooks.context import Context
from plugframe.utils.lost_rank import LATE_TEXTS, LOST_TEXTS, NETWORK_TYPES
from plugframe.utils.stores import fresh_prefix

#: How long answers are waited for: after a timeout, and after a rank's connection was lost, which often has died.
LATE_S, LOST_S = 5.0, 2.0
_POLL_S = 0.01
#: Of an alarm that has rung in these last seconds nobody has to ring again.
_ONE_ALARM_S = 10.0
_FOR_EVER = timedelta(days=1000)
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_INSTRUMENT = os.path.join(_PACKAGE, "diagnostics", "instrument.py")
#: What a rank is doing, by the function of this package that runs the user's code or waits for it.
_DOING = {
    (os.path.join("adopt", "module.py"), "run"): "forward",
    (os.path.join("data", "loader.py"), "_batches"): "reading a batch",
}


class HangReporter:
    """A thread that answers for its rank, and what asks all of them.

    The thread waits inside a connection of its own to the store at which the ranks met: it costs nothing until it
    is woken, and answers also while the rank's own thread hangs.
    """

    def __init__(self, context: Context, log: CallLog) -> None:
        self._rank, self._size = context.world.global_rank, context.world.world_size
        self._log = log
        self._owner = threading.get_ident()
        self._line: _Line | None = None
        self._closed = False
        group = context.hooks.collective_process_group()
        store: Any = group.get_group_store() if hasattr(group, "get_group_store") else None
        if hasattr(store, "clone"):
            # A job may be set up more than once over one store: the user's own process group stays.
            prefix = fresh_prefix(store, "alarm", self._rank)
            self._line = _Line(store, prefix, self._rank, self._size, self.account)
            self._line.start()

    def explain(self, error: BaseException, *, late: bool = False) -> Exception | None:
        """Return the error that says where every rank is, None if `error` is not about ranks that did not come.

        Args:
            late: it is known to be about a rank that did not come in time.
        """
        if self._closed or isinstance(error, RankLostError):
            return None
        said = str(error)
        late = late or any(text in said for text in LATE_TEXTS)
        types = {kind.__name__ for kind in type(error).__mro__}
        if not (late or NETWORK_TYPES & types or any(text in said for text in LOST_TEXTS)):
            return None
        waited_s = self._log.waited_s()
        mine = self.account(own=True)
        seconds = LATE_S if late else LOST_S
        accounts: dict[int, Account | None] = dict.fromkeys(range(self._size))
        if self._line is not None:
            accounts.update(self._line.ask(seconds))
        accounts[self._rank] = mine
        found = find(accounts, self._rank, seconds=seconds)
        head = _head(mine, found.culprit, waited_s, late=late)
        culprit = accounts[found.culprit] if found.culprit is not None else None
        blamed = None
        if found.culprit is not None:
            host = culprit.host if culprit is not None else ""
            stack = culprit.stack if culprit is not None else ""
            alive = late and culprit is not None and not culprit.left
            blamed = {"rank": found.culprit, "host": host, "stack": stack, "alive": alive, "text": found.text}
        stack = f"\nRank {found.culprit} is at:\n{blamed['stack']}" if blamed and blamed["stack"] else ""
        kind = CollectiveTimeoutError if late else RankLostError
        return kind(f"{head}: {found.text}{stack}", blamed=blamed)

    def look(self, occasion: str) -> dict[int, Account | None]:
        """Ask every rank where it is; nothing if another rank does it on this occasion, or if there is no way to."""
        line = self._line
        if line is None or not line.claim(occasion):
            return {}
        accounts: dict[int, Account | None] = dict.fromkeys(range(self._size))
        accounts.update(line.ask(LATE_S, looking=True))
        accounts[self._rank] = self.account()
        return accounts

    def account(self, *, own: bool = False, error: str = "", left: bool = False) -> Account:
        """Say where this rank is."""
        frame = sys._current_frames().get(self._owner) if not own else sys._getframe(1)
        running, last = self._log.running(), self._log.last()
        doing, stack = _where(frame, self._log)
        return Account(
            rank=self._rank,
            host=socket.gethostname(),
            running=None if left else running,
            waited_s=0.0 if left else self._log.waited_s(),
            last=last,
            doing=doing,
            stack="" if left else stack,
            left=left,
            error=error,
        )

    def close(self) -> None:
        """Tell the others that this rank leaves, and with which error; end the thread. It does not wait for them."""
        line, self._line, self._closed = self._line, None, True
        if line is not None:
            error = sys.exc_info()[1]
            said = traceback.format_exception_only(type(error), error)[0].splitlines()[0] if error is not None else ""
            line.close(self.account(own=True, error=said, left=True))


def _head(mine: Account, culprit: int | None, waited_s: float, *, late: bool) -> str:
    if mine.running is None:
        return f"An exchange {mine.doing} waited in vain"
    call = mine.running.text
    if culprit == mine.rank:
        return f"The ranks do not make the same calls, {waited_s:.3g} s after {call} began"
    if culprit is None:
        return f"{call} did not end within {waited_s:.3g} s" if late else f"{call} lost the connection to a rank"
    if late:
        return f"Rank {culprit} did not come to {call} within {waited_s:.3g} s"
    return f"{call} lost the connection to rank {culprit}"


def _where(frame: FrameType | None, log: CallLog) -> tuple[str, str]:
    """Return what a stack says: ``"in forward (model.py:31)"``, and the stack without what surrounds the user's."""
    if frame is None:
        return "", ""
    frames = [each for each, _ in traceback.walk_stack(frame)]
    users = next((each for each in frames if log.is_users(each)), None)
    phases = (
        _DOING.get((each.f_code.co_filename[len(_PACKAGE) :], each.f_code.co_name), "")
        for each in frames
        if each.f_code.co_filename.startswith(_PACKAGE)
    )
    phase = next(filter(None, phases), "")
    if users is None:
        return (f"in {phase}" if phase else ""), ""
    name, place = users.f_code.co_name, site(users.f_code.co_filename, users.f_lineno)
    doing = f"at {place}" if name.startswith("<") else f"in {name} ({place})"
    if phase and phase != name:
        doing += f", {phase}" if " " in phase else f", in {phase}"
    return doing, _shown(frames, log)


def _shown(frames: list[FrameType], log: CallLog) -> str:
    """Return a stack from where the user's code begins to where this package begins to keep its calls."""
    lines = list(traceback.extract_stack(frames[0]))
    users = [log.is_users(each) and not each.f_code.co_filename.startswith("<") for each in reversed(frames)]
    first = users.index(True) if True in users else 0
    last = next((number for number, line in enumerate(lines) if line.filename == _INSTRUMENT), len(lines))
    return "".join(traceback.format_list(lines[first:last])).rstrip()


class _Line:
    """Two connections to the store: one in which the thread waits, one for who speaks."""

    def __init__(self, store: Any, prefix: str, rank: int, size: int, account: Callable[[], Account]) -> None:
        self._waits, self._speaks = store.clone(), store.clone()
        self._prefix, self._rank, self._size = prefix, rank, size
        self._account = account
        self._turn, self._rang = 0, 0.0
        self._closing = False
        self._left: dict[int, Account] = {}
        self._over = False
        self._thread = threading.Thread(target=self._listen, name="plugframe-alarm", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def claim(self, occasion: str) -> bool:
        """Say whether this rank is the first to come with this occasion."""
        if self._over or self._closing:
            return False
        try:
            first = self._speaks.compare_set(self._key("occasion", occasion), "", str(self._rank))
        except RuntimeError:  # the store has gone
            return False
        return bool(first.decode() == str(self._rank))

    def ask(self, seconds: float, *, looking: bool = False) -> dict[int, Account]:
        """Have every rank say where it is, and return what they said within so many seconds.

        Args:
            looking: nothing has failed: an alarm that follows asks anew.
        """
        if self._over:
            return dict(self._left)
        try:
            turn = self._turn
            if looking or turn == 0 or time.monotonic() - self._rang > _ONE_ALARM_S:
                turn += 1
                if self._speaks.compare_set(self._key("alarm", turn), "", str(self._rank)).decode() == str(self._rank):
                    word = json.dumps({"word": "look" if looking else "alarm"})
                    keys = [self._key("to", rank, turn) for rank in range(self._size)]
                    self._speaks.multi_set(keys, [word] * self._size)
            return self._answers(turn, seconds)
        except RuntimeError:  # the store has gone, with the rank or the launcher that served it
            return dict(self._left)

    def _answers(self, turn: int, seconds: float) -> dict[int, Account]:
        found: dict[int, Account] = {}
        until = time.monotonic() + seconds
        while len(found) < self._size - 1:
            for rank in range(self._size):
                if rank == self._rank or rank in found:
                    continue
                for key in (self._key("left", rank), self._key("answer", turn, rank)):
                    if self._speaks.check([key]):
                        found[rank] = Account.of(json.loads(self._speaks.get(key)))
                        break
            if time.monotonic() > until or self._over or self._closing:
                break
            time.sleep(_POLL_S)
        return {**self._left, **found}

    def close(self, farewell: Account) -> None:
        """Leave word, and end the thread. Rank 0 may serve the store: with it all others end theirs."""
        self._closing = True
        if not self._over:
            word = json.dumps({"word": "left", "account": farewell.as_dict()})
            to = range(self._size) if self._rank == 0 else (self._rank,)
            # A server that goes as soon as this returns has then answered those that wait.
            with contextlib.suppress(RuntimeError):
                self._speaks.set(self._key("left", self._rank), json.dumps(farewell.as_dict()))
                for turn in (self._turn + 1, self._turn + 2):
                    self._speaks.multi_set([self._key("to", rank, turn) for rank in to], [word] * len(to))
                self._speaks.check([self._key("left", self._rank)])
        self._thread.join(1.0)

    def _listen(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store has gone
            while not self._closing:
                key = self._key("to", self._rank, self._turn + 1)
                self._waits.wait([key], _FOR_EVER)
                told = json.loads(self._waits.get(key))
                if told["word"] != "look":
                    self._rang = time.monotonic()
                self._turn += 1
                if told["word"] == "left":
                    account = Account.of(told["account"])
                    self._left[account.rank] = account
                    break
                self._waits.set(self._key("answer", self._turn, self._rank), json.dumps(self._account().as_dict()))
        self._over = True

    def _key(self, *parts: object) -> str:
        return "/".join([self._prefix, *map(str, parts)])
