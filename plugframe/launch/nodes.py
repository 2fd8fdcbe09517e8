"""Where the launchers of several nodes meet: at node 0's address."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

from plugframe.errors import UsageError
from plugframe.launch.port_owner import holder_of
from plugframe.launch.rendezvous import STORE_TIMEOUT_S, Loopback, listening, serve
from plugframe.launch.signed import Signed

_POLL_S = 0.1
#: How often a launcher asks whether another one has failed or starts again.
_LOOK_S = 0.5
#: How long a launcher may be silent before it is taken for lost, with its machine perhaps.
LOST_S = 60.0
#: How often it is said who is waited for.
_SAY_S = 10.0
#: How long a failed node waits for the others to tell what they know.
_FAREWELL_S = 5.0
_FAILED = "plugframe/failed"


class ElsewhereError(Exception):
    """A rank of another node failed, or that node cannot be reached any more."""


class Nodes(Loopback):
    """Several nodes, their number and ranks known beforehand.

    Their launchers agree on attempts in a store on node 0, and tell each other there which rank failed. The
    first attempt's ranks use that store too; those of a later one get a fresh one at another port.
    """

    #: Who runs the store, and the options that say where it is.
    _host, _typed = "node 0", "--main-address and --main-port"

    def __init__(
        self,
        on_beat: Callable[[], None],
        *,
        address: str,
        port: int,
        num_nodes: int,
        node_rank: int,
        timeout_s: float,
    ) -> None:
        super().__init__(on_beat)
        self._address, self._port = address, port
        self._num_nodes, self._node_rank = num_nodes, node_rank
        self._timeout_s = timeout_s
        self._control: Store | None = None
        self._line: socket.socket | None = None
        self._heard: dict[int, tuple[int, float]] = {}
        self._attempt = -1
        self._next_look = 0.0
        self._hosts = node_rank == 0

    @property
    def control(self) -> Store:
        """The store at which the launchers meet."""
        assert self._control is not None
        return self._control

    @property
    def words(self) -> Signed:
        """The same store for what the launchers tell each other."""
        return Signed(self.control)

    def next_rendezvous(self) -> RendezvousInfo:
        self._attempt += 1
        if self._control is None:
            self._control = self._connect()
        self.control.set(self._key("begun"), "1")
        self._meet()
        port = self._port if self._attempt == 0 else self._fresh_port()
        store = Patient(self._key("agents"), self.control, self._look)
        return RendezvousInfo(store, self._node_rank, self._num_nodes, RendezvousStoreInfo(self._address, port))

    def num_nodes_waiting(self) -> int:
        self._on_beat()
        if time.monotonic() < self._next_look:
            return 0
        self._next_look = time.monotonic() + _LOOK_S
        self._look()
        self.recalled = self._check(f"plugframe/{self._attempt + 1}/begun")
        return int(self.recalled)

    def tell_failure(self, told: dict[str, Any]) -> list[dict[str, Any]]:
        until = time.monotonic() + _FAREWELL_S
        if self._control is None or self._main_has_gone():
            return [told]
        try:
            if self._hosts:  # the store goes with it: not before the others have told, and read, theirs
                self._tell(told)
                for _ in self._polls(until):
                    if len(self._failures()) == self._num_nodes:
                        break
                return self._failures()
            if not told["certain"]:
                for _ in self._polls(until):
                    if any(other["certain"] for other in self._failures()):
                        break
            known = self._failures()
            self._tell(told)
            return [*known, told]
        except DistError:
            return [told]

    def part(self) -> None:
        if not self._hosts:
            self.control.set(f"plugframe/parted/{self._node_rank}", "1")  # the last word: the store may close upon it
            return
        keys = [f"plugframe/parted/{node}" for node in range(self._num_nodes) if node != self._node_rank]
        for _ in self._polls(time.monotonic() + _FAREWELL_S):
            if self.control.check(keys):
                return

    def _failures(self) -> list[dict[str, Any]]:
        keys = [f"{_FAILED}/{node}" for node in range(self._num_nodes)]
        return [json.loads(self.words.get(key)) for key in keys if self.control.check([key])]

    def get_run_id(self) -> str:
        return f"{self._address}:{self._port}"

    def shutdown(self) -> bool:
        self._control = None
        if self._line is not None:
            self._line.close()
            self._line = None
        return super().shutdown()

    def _look(self) -> None:
        """Tell that this launcher lives; raise if another node has failed, or cannot be heard any more."""
        if self._main_has_gone():
            raise self._without_main()
        try:
            failed = self.control.check([_FAILED])
            self.control.add(f"plugframe/alive/{self._node_rank}", 1)
            lost = None if failed else self._lost_node()
        except DistError as error:
            raise self._without_main() from error
        if failed:
            self.recalled = True
            raise ElsewhereError("")
        if lost is not None:
            self._on_lost(lost)

    def _on_lost(self, node: int) -> None:
        self.recalled = True
        raise ElsewhereError(f"Node {node} has not been heard of for {self._lost_s():g} s.")

    def _lost_s(self) -> float:
        return LOST_S

    def _lost_node(self) -> int | None:
        if self._node_rank != 0:
            return None  # one launcher watches over all, and tells the others
        return self._silent_node()

    def _silent_node(self) -> int | None:
        now = time.monotonic()
        for node in range(self._num_nodes):
            count = self.control.add(f"plugframe/alive/{node}", 0)
            before, since = self._heard.get(node, (-1, now))
            self._heard[node] = (count, now if count != before else since)
            if (
                count and now - self._heard[node][1] > self._lost_s()
            ):  # those that have never come are waited for elsewhere
                return node
        return None

    def _check(self, key: str) -> bool:
        try:
            return self.control.check([key])
        except DistError as error:
            raise self._without_main() from error

    def _without_main(self) -> ElsewhereError:
        self.recalled = True
        return ElsewhereError(f"{self._host.capitalize()} at {self._where()} has gone without a word.")

    def _main_has_gone(self) -> bool:
        """Say whether node 0 has closed its end of a connection on which nothing is ever sent.

        The store itself would say so too, with two pages of C++ frames on the terminal.
        """
        if self._line is None:
            return False
        try:
            return not self._line.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _tell(self, told: dict[str, Any]) -> None:
        self.control.set(_FAILED, "1")
        self.words.set(f"{_FAILED}/{self._node_rank}", json.dumps(told))  # last: see `part`

    def _key(self, name: str) -> str:
        return f"plugframe/{self._attempt}/{name}"

    def _connect(self) -> Store:
        store = serve(self._listen(), self._address) if self._node_rank == 0 else self._reach()
        count = Signed(store).compare_set("plugframe/nodes", "", str(self._num_nodes)).decode()
        if count != str(self._num_nodes):
            raise UsageError(
                f"Node {self._node_rank} was started as one of {self._num_nodes} nodes, another of {count}."
            )
        return store

    def _reach(self) -> TCPStore:
        """Return the store that another launcher serves, once it does."""
        self._line = self._wait_for_main()
        try:
            timeout = timedelta(seconds=STORE_TIMEOUT_S)
            return TCPStore(self._address, self._port, None, False, timeout, False)
        except DistError as error:
            text = f"{self._where()} answers, but not as {self._host} of a job does ({error})."
            raise UsageError(text) from None

    def _listen(self) -> socket.socket:
        """Listen at the main address alone, or, where that leads here by way of another, at all."""
        try:
            try:
                return listening(self._address, self._port)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
            server = listening("0.0.0.0", self._port)
            try:
                socket.create_connection((self._address, self._port), timeout=_FAREWELL_S).close()
            except OSError:
                server.close()
                raise
            return server
        except OSError as error:
            why, hint = error.strerror or error, "--main-address is node 0's own"
            if error.errno == errno.EADDRINUSE:
                who = holder_of(self._port)
                why, hint = f"{why}: by {who}" if who else why, "choose another --main-port"
            raise UsageError(f"Node 0 cannot listen at {self._where()} ({why}): {hint}.") from None

    def _wait_for_main(self) -> socket.socket:
        whom = f"{self._host} at {self._where()}"
        last: object = None
        for _ in self._patiently(lambda: whom):
            try:
                line = socket.create_connection((self._address, self._port), timeout=_FAREWELL_S)
                line.setblocking(False)
                return line
            except OSError as error:
                last = error.strerror or error
        raise UsageError(
            f"{self._host.capitalize()} did not answer at {self._where()} within {self._timeout_s:g} s ({last}): "
            f"start it, or correct {self._typed}."
        )

    def _meet(self) -> None:
        """Wait until every node has come to this attempt."""
        me = f"process {os.getpid()} on {socket.gethostname()}"
        holder = self.words.compare_set(self._key(f"node/{self._node_rank}"), "", me).decode()
        if holder != me:
            raise UsageError(f"Node rank {self._node_rank} was given twice: to {me}, and to {holder}.")
        missing = list(range(self._num_nodes))

        def whom() -> str:
            return f"node rank {_numbers(missing)} of {self._num_nodes} at {self._where()}"

        for _ in self._patiently(whom):
            self._look()
            missing[:] = [node for node in missing if not self._check(self._key(f"node/{node}"))]
            if not missing:
                return
        raise UsageError(
            f"{len(missing)} of {self._num_nodes} nodes did not come to {self._where()} within {self._timeout_s:g} s "
            f"(node rank {_numbers(missing)}): start them with this --main-address and --main-port."
        )

    def _fresh_port(self) -> int:
        if self._node_rank == 0:
            host = self._address
            try:
                server = listening(host, 0)
            except OSError:
                server = listening("0.0.0.0", 0)
            store = self._store = serve(server, host)
            self.words.set(self._key("port"), str(store.port))
        return int(self.words.get(self._key("port")))

    def _where(self) -> str:
        return f"{self._address}:{self._port}"

    def _patiently(self, whom: Callable[[], str]) -> Iterator[None]:
        """Iterate until the job's timeout; say every so often for whom.

        In Python, not inside the store, so that Ctrl-C works.
        """
        start = time.monotonic()
        saying = start + _SAY_S
        for _ in self._polls(start + self._timeout_s):
            yield
            if time.monotonic() >= saying:
                saying += _SAY_S
                waited_s = time.monotonic() - start
                self._say(f"waiting for {whom()}, {waited_s:.0f} of {self._timeout_s:g} s at most")

    def _say(self, text: str) -> None:
        print(f"node {self._node_rank}: {text}", file=sys.stderr, flush=True)

    def _polls(self, until: float) -> Iterator[None]:
        yield
        while time.monotonic() < until:
            time.sleep(_POLL_S)
            yield


def _numbers(nodes: Sequence[int]) -> str:
    return ", ".join(map(str, nodes))


class Patient(PrefixStore):
    """A store for torch's agents: waiting in it ends on Ctrl-C, and when a node has failed."""

    def __init__(self, prefix: str, store: Store, look: Callable[[], None]) -> None:
        super().__init__(prefix, store)
        self._look = look

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait as long as it takes: for other nodes' ranks, when those of this one have ended."""
        while not self.check(list(keys)):
            self._look()
            time.sleep(_POLL_S)

    def get(self, key: str) -> bytes:
        self._expect([key])
        return super().get(key)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._expect(keys)
        return super().multi_get(keys)

    def _expect(self, keys: list[str]) -> None:
        until = time.monotonic() + STORE_TIMEOUT_S
        while not self.check(keys):
            self._look()
            if time.monotonic() > until:
                raise ElsewhereError("A node came, and left before the ranks were started.")
            time.sleep(_POLL_S)
