"""Rendezvous of the launchers of several nodes, at node 0's address."""

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
from plugframe.launch.port_owner import find_port_owner
from plugframe.launch.rendezvous import STORE_TIMEOUT_S, LoopbackRendezvous, listening, serve
from plugframe.launch.signed import SignedStore

_POLL_S = 0.1
#: How often a launcher checks whether another one has failed or restarted.
_CHECK_INTERVAL_S = 0.5
#: How long a launcher may send no heartbeat before its node counts as lost.
LOST_NODE_TIMEOUT_S = 60.0
#: Interval of progress messages while waiting.
_PROGRESS_INTERVAL_S = 10.0
#: How long a node that failed or finished waits for messages of the others.
_SHUTDOWN_TIMEOUT_S = 5.0
_FAILED_KEY = "plugframe/failed"


class ElsewhereError(Exception):
    """A rank of another node failed, or that node is unreachable."""


class NodeRendezvous(LoopbackRendezvous):
    """Rendezvous of a fixed number of nodes with known ranks.

    The launchers share a store on node 0, in which they synchronise attempts and publish failures. The ranks of the
    first attempt use that store too; those of a later attempt get a new one at another port.
    """

    #: Name of the node that serves the store, and the options that set its address, for messages.
    _host_name, _address_options = "node 0", "--main-address and --main-port"

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
        self._control_store: Store | None = None
        self._connection: socket.socket | None = None
        self._heartbeats: dict[int, tuple[int, float]] = {}
        self._attempt = -1
        self._next_check = 0.0
        self._is_host = node_rank == 0

    @property
    def control_store(self) -> Store:
        """The store that the launchers share."""
        assert self._control_store is not None
        return self._control_store

    @property
    def signed_store(self) -> SignedStore:
        """The shared store with signed values, for messages between launchers."""
        return SignedStore(self.control_store)

    def next_rendezvous(self) -> RendezvousInfo:
        self._attempt += 1
        if self._control_store is None:
            self._control_store = self._connect()
        self.control_store.set(self._key("begun"), "1")
        self._wait_for_nodes()
        port = self._port if self._attempt == 0 else self._new_port()
        store = InterruptibleStore(self._key("agents"), self.control_store, self._check_nodes)
        return RendezvousInfo(store, self._node_rank, self._num_nodes, RendezvousStoreInfo(self._address, port))

    def num_nodes_waiting(self) -> int:
        self._on_beat()
        if time.monotonic() < self._next_check:
            return 0
        self._next_check = time.monotonic() + _CHECK_INTERVAL_S
        self._check_nodes()
        self.stop_requested = self._check(f"plugframe/{self._attempt + 1}/begun")
        return int(self.stop_requested)

    def share_failure(self, failure: dict[str, Any]) -> list[dict[str, Any]]:
        until = time.monotonic() + _SHUTDOWN_TIMEOUT_S
        if self._control_store is None or self._is_host_lost():
            return [failure]
        try:
            if self._is_host:
                # The store ends with this process: wait until the others have published and read the failures.
                self._publish_failure(failure)
                for _ in self._polls(until):
                    if len(self._failures()) == self._num_nodes:
                        break
                return self._failures()
            if not failure["certain"]:
                for _ in self._polls(until):
                    if any(other["certain"] for other in self._failures()):
                        break
            known = self._failures()
            self._publish_failure(failure)
            return [*known, failure]
        except DistError:
            return [failure]

    def leave(self) -> None:
        if not self._is_host:
            self.control_store.set(f"plugframe/parted/{self._node_rank}", "1")  # last: the store may be closed after it
            return
        keys = [f"plugframe/parted/{node}" for node in range(self._num_nodes) if node != self._node_rank]
        for _ in self._polls(time.monotonic() + _SHUTDOWN_TIMEOUT_S):
            if self.control_store.check(keys):
                return

    def _failures(self) -> list[dict[str, Any]]:
        keys = [f"{_FAILED_KEY}/{node}" for node in range(self._num_nodes)]
        return [json.loads(self.signed_store.get(key)) for key in keys if self.control_store.check([key])]

    def get_run_id(self) -> str:
        return f"{self._address}:{self._port}"

    def shutdown(self) -> bool:
        self._control_store = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        return super().shutdown()

    def _check_nodes(self) -> None:
        """Send a heartbeat; raise if another node has failed or is lost."""
        if self._is_host_lost():
            raise self._host_lost()
        try:
            failed = self.control_store.check([_FAILED_KEY])
            self.control_store.add(f"plugframe/alive/{self._node_rank}", 1)
            lost = None if failed else self._find_lost_node()
        except DistError as error:
            raise self._host_lost() from error
        if failed:
            self.stop_requested = True
            raise ElsewhereError("")
        if lost is not None:
            self._on_lost(lost)

    def _on_lost(self, node: int) -> None:
        self.stop_requested = True
        raise ElsewhereError(f"Node {node} sent no heartbeat for {self._lost_timeout_s():g} s.")

    def _lost_timeout_s(self) -> float:
        return LOST_NODE_TIMEOUT_S

    def _find_lost_node(self) -> int | None:
        if self._node_rank != 0:
            return None  # node 0 monitors all nodes and publishes the failure
        return self._silent_node()

    def _silent_node(self) -> int | None:
        now = time.monotonic()
        for node in range(self._num_nodes):
            count = self.control_store.add(f"plugframe/alive/{node}", 0)
            before, since = self._heartbeats.get(node, (-1, now))
            self._heartbeats[node] = (count, now if count != before else since)
            # Nodes that have not joined yet are waited for elsewhere.
            if count and now - self._heartbeats[node][1] > self._lost_timeout_s():
                return node
        return None

    def _check(self, key: str) -> bool:
        try:
            return self.control_store.check([key])
        except DistError as error:
            raise self._host_lost() from error

    def _host_lost(self) -> ElsewhereError:
        self.stop_requested = True
        return ElsewhereError(
            f"{self._host_name.capitalize()} at {self._endpoint()} closed the connection without reporting a failure."
        )

    def _is_host_lost(self) -> bool:
        """Return whether the host has closed its end of an idle connection.

        The store would report it too, but with two pages of C++ stack on the terminal.
        """
        if self._connection is None:
            return False
        try:
            return not self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _publish_failure(self, failure: dict[str, Any]) -> None:
        self.control_store.set(_FAILED_KEY, "1")
        self.signed_store.set(f"{_FAILED_KEY}/{self._node_rank}", json.dumps(failure))  # last, see `leave`

    def _key(self, name: str) -> str:
        return f"plugframe/{self._attempt}/{name}"

    def _connect(self) -> Store:
        store = serve(self._listen(), self._address) if self._node_rank == 0 else self._connect_to_host()
        count = SignedStore(store).compare_set("plugframe/nodes", "", str(self._num_nodes)).decode()
        if count != str(self._num_nodes):
            raise UsageError(
                f"Node {self._node_rank} was started with --num-nodes={self._num_nodes}, another node with "
                f"--num-nodes={count}: use the same value."
            )
        return store

    def _connect_to_host(self) -> TCPStore:
        """Connect to the store of the host, once it is served."""
        self._connection = self._wait_for_host()
        try:
            timeout = timedelta(seconds=STORE_TIMEOUT_S)
            return TCPStore(self._address, self._port, None, False, timeout, False)
        except DistError as error:
            text = f"{self._endpoint()} accepts connections, but is not {self._host_name} of this job ({error})."
            raise UsageError(text) from None

    def _listen(self) -> socket.socket:
        """Listen at the main address only, or on all interfaces if it is a forwarded address of this node."""
        try:
            try:
                return listening(self._address, self._port)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
            server = listening("0.0.0.0", self._port)
            try:
                socket.create_connection((self._address, self._port), timeout=_SHUTDOWN_TIMEOUT_S).close()
            except OSError:
                server.close()
                raise
            return server
        except OSError as error:
            why, hint = error.strerror or error, "--main-address must be an address of node 0"
            if error.errno == errno.EADDRINUSE:
                owner = find_port_owner(self._port)
                why, hint = f"{why} by {owner}" if owner else why, "choose another --main-port"
            raise UsageError(f"Node 0 cannot listen at {self._endpoint()} ({why}): {hint}.") from None

    def _wait_for_host(self) -> socket.socket:
        awaited = f"{self._host_name} at {self._endpoint()}"
        last: object = None
        for _ in self._poll_with_progress(lambda: awaited):
            try:
                line = socket.create_connection((self._address, self._port), timeout=_SHUTDOWN_TIMEOUT_S)
                line.setblocking(False)
                return line
            except OSError as error:
                last = error.strerror or error
        raise UsageError(
            f"{self._host_name.capitalize()} did not respond at {self._endpoint()} within {self._timeout_s:g} s "
            f"({last}): start it, or correct {self._address_options}."
        )

    def _wait_for_nodes(self) -> None:
        """Wait until every node has joined this attempt."""
        this_process = f"process {os.getpid()} on {socket.gethostname()}"
        owner = self.signed_store.compare_set(self._key(f"node/{self._node_rank}"), "", this_process).decode()
        if owner != this_process:
            raise UsageError(f"Node rank {self._node_rank} is used twice, by {this_process} and by {owner}.")
        missing = list(range(self._num_nodes))

        def awaited() -> str:
            return f"node rank {_numbers(missing)} of {self._num_nodes} at {self._endpoint()}"

        for _ in self._poll_with_progress(awaited):
            self._check_nodes()
            missing[:] = [node for node in missing if not self._check(self._key(f"node/{node}"))]
            if not missing:
                return
        raise UsageError(
            f"{len(missing)} of {self._num_nodes} nodes did not join at {self._endpoint()} within "
            f"{self._timeout_s:g} s (node rank {_numbers(missing)}): start them with this --main-address and "
            "--main-port."
        )

    def _new_port(self) -> int:
        if self._node_rank == 0:
            host = self._address
            try:
                server = listening(host, 0)
            except OSError:
                server = listening("0.0.0.0", 0)
            store = self._store = serve(server, host)
            self.signed_store.set(self._key("port"), str(store.port))
        return int(self.signed_store.get(self._key("port")))

    def _endpoint(self) -> str:
        return f"{self._address}:{self._port}"

    def _poll_with_progress(self, awaited: Callable[[], str]) -> Iterator[None]:
        """Iterate until the job's timeout; print at intervals what is awaited.

        Polls in Python, because waiting inside the store would block Ctrl-C.
        """
        start = time.monotonic()
        next_message = start + _PROGRESS_INTERVAL_S
        for _ in self._polls(start + self._timeout_s):
            yield
            if time.monotonic() >= next_message:
                next_message += _PROGRESS_INTERVAL_S
                waited_s = time.monotonic() - start
                self._log(f"waiting for {awaited()}, {waited_s:.0f} of {self._timeout_s:g} s at most")

    def _log(self, text: str) -> None:
        print(f"node {self._node_rank}: {text}", file=sys.stderr, flush=True)

    def _polls(self, until: float) -> Iterator[None]:
        yield
        while time.monotonic() < until:
            time.sleep(_POLL_S)
            yield


def _numbers(nodes: Sequence[int]) -> str:
    return ", ".join(map(str, nodes))


class InterruptibleStore(PrefixStore):
    """Store for torch's agents whose waits end on Ctrl-C, and when a node has failed."""

    def __init__(self, prefix: str, store: Store, check_nodes: Callable[[], None]) -> None:
        super().__init__(prefix, store)
        self._check_nodes = check_nodes

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait without a timeout: torch waits here for the ranks of other nodes after those of this node have ended."""
        while not self.check(list(keys)):
            self._check_nodes()
            time.sleep(_POLL_S)

    def get(self, key: str) -> bytes:
        self._wait_for_keys([key])
        return super().get(key)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._wait_for_keys(keys)
        return super().multi_get(keys)

    def _wait_for_keys(self, keys: list[str]) -> None:
        until = time.monotonic() + STORE_TIMEOUT_S
        while not self.check(keys):
            self._check_nodes()
            if time.monotonic() > until:
                raise ElsewhereError("A node joined, and left before the ranks were started.")
            time.sleep(_POLL_S)
