"""Where the ranks meet: on loopback on one node, at node 0's address on several."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from plugframe.errors import UsageError

LOOPBACK = "127.0.0.1"
_POLL_S = 0.1
#: How long to wait in silence for the other nodes.
_PATIENCE_S = 2.0
#: How long a store may take to answer once its port does.
_STORE_TIMEOUT_S = 60.0


class Loopback(RendezvousHandler):
    """One node: a store on loopback, a fresh one for each attempt.

    The socket is bound before the store is made and handed to it, so no other process can take the port
    between; and ranks of a new attempt never read the addresses of those that have gone.
    """

    def __init__(self, on_beat: Callable[[], None]) -> None:
        self._on_beat = on_beat
        self._store: TCPStore | None = None

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        self._store = None  # closes the one before
        self._store = serve(listening(LOOPBACK, 0), LOOPBACK)
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._store.port))

    def num_nodes_waiting(self) -> int:
        self._on_beat()
        return 0

    def get_backend(self) -> str:
        return "plugframe"

    def get_run_id(self) -> str:
        return f"{os.getpid()}"

    def is_closed(self) -> bool:
        return self._store is None

    def set_closed(self) -> None:
        self.shutdown()

    def shutdown(self) -> bool:
        self._store = None
        return True


class Nodes(Loopback):
    """Several nodes, their number and ranks known beforehand.

    Their launchers meet at node 0. There they agree on attempts, and tell each other which rank failed.
    """

    def __init__(
        self, on_beat: Callable[[], None], *, address: str, port: int, num_nodes: int, node_rank: int, timeout_s: float
    ) -> None:
        super().__init__(on_beat)
        self._address, self._port = address, port
        self._num_nodes, self._node_rank = num_nodes, node_rank
        self._timeout_s = timeout_s
        self._control: TCPStore | None = None
        self._attempt = -1

    def next_rendezvous(self) -> RendezvousInfo:
        self._attempt += 1
        if self._control is None:
            self._control = self._connect()
        control = self._control
        control.set(self._key("begun"), "1")
        self._meet(control)
        port = self._port
        if self._attempt > 0:  # the first attempt's ranks have left their addresses in the control store
            self._store = None
            if self._node_rank == 0:
                self._store = serve(self._listen(0), self._address)
                control.set(self._key("port"), str(self._store.port))
            port = int(control.get(self._key("port")))
        return RendezvousInfo(
            Patient(self._key("agent"), control),
            self._node_rank,
            self._num_nodes,
            RendezvousStoreInfo(self._address, port),
        )

    def num_nodes_waiting(self) -> int:
        self._on_beat()
        try:
            if self.failures():
                raise ElsewhereError
            assert self._control is not None
            return int(self._control.check([f"plugframe/{self._attempt + 1}/begun"]))
        except DistError as error:
            raise NodeLostError(f"node 0 at {self._address}:{self._port} has gone") from error

    def tell_failure(self, words: Mapping[str, Any], patience_s: float) -> list[dict[str, Any]]:
        """Tell the other nodes of a failure here, and return what all have told within `patience_s`.

        Node 0 keeps the store, so it waits until the others have told, and have read, theirs.
        """
        assert self._control is not None
        try:
            self._control.set(f"plugframe/failed/{self._node_rank}", json.dumps(words))
            until = time.monotonic() + patience_s
            while len(self.failures()) < self._num_nodes and time.monotonic() < until:
                if self._node_rank != 0 and any(told["certain"] for told in self.failures()):
                    break
                time.sleep(_POLL_S)
            return self.failures()
        except DistError:
            return [dict(words)]

    def failures(self) -> list[dict[str, Any]]:
        """Return what the nodes have told of failures so far."""
        assert self._control is not None
        keys = [f"plugframe/failed/{node}" for node in range(self._num_nodes)]
        return [json.loads(self._control.get(key)) for key in keys if self._control.check([key])]

    def shutdown(self) -> bool:
        self._control = None
        return super().shutdown()

    def _key(self, name: str) -> str:
        return f"plugframe/{self._attempt}/{name}"

    def _connect(self) -> TCPStore:
        if self._node_rank == 0:
            store = serve(self._listen(self._port), self._address)
        else:
            self._wait_for_main()
            store = TCPStore(self._address, self._port, None, False, timedelta(seconds=_STORE_TIMEOUT_S), False)
        nodes = store.compare_set("plugframe/nodes", "", str(self._num_nodes)).decode()
        if nodes != str(self._num_nodes):
            raise UsageError(f"Node {self._node_rank} was started with {self._num_nodes} nodes, another one with {nodes}.")
        return store
