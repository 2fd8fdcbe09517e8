"""Rendezvous of the ranks of one node, on the loopback interface."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

LOOPBACK = "127.0.0.1"
#: How long a store may take to respond once its port accepts connections.
STORE_TIMEOUT_S = 60.0


class LoopbackRendezvous(RendezvousHandler):
    """Rendezvous of one node: a store on loopback, a new one for each attempt.

    The socket is bound first and handed to the store, so no other process can take the port in between. Ranks of a
    new attempt never read addresses of the previous one.

    Attributes:
        stop_requested: another node failed or restarted, and the ranks on this node must stop.
    """

    def __init__(self, on_beat: Callable[[], None]) -> None:
        self.stop_requested = False
        self._on_beat = on_beat
        self._store: TCPStore | None = None

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        store = self._store = serve(listening(LOOPBACK, 0), LOOPBACK)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, store.port))

    def num_nodes_waiting(self) -> int:
        """Return how many nodes wait to join. Torch calls it whenever all ranks are alive."""
        self._on_beat()
        return 0

    def share_failure(self, failure: dict[str, Any]) -> list[dict[str, Any]]:
        """Publish a failure of this node, and return the failures of all nodes."""
        return [failure]

    def leave(self) -> None:
        """Notify the other nodes that all ranks of this node have finished."""

    def get_backend(self) -> str:
        return "plugframe"

    def get_run_id(self) -> str:
        return str(os.getpid())

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        self.shutdown()

    def shutdown(self) -> bool:
        self._store = None
        return True


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens at `host` only, at a free port if `port` is 0."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    server = socket.socket(family, kind, protocol)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen()
    except OSError:
        server.close()
        raise
    return server


def serve(server: socket.socket, host: str) -> TCPStore:
    """Return a store that takes over the socket `server`, and connects to itself through `host`."""
    port = server.getsockname()[1]
    timeout = timedelta(seconds=STORE_TIMEOUT_S)
    return TCPStore(host, port, None, True, timeout, False, master_listen_fd=server.detach())
