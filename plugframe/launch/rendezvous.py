"""Where the ranks of one node meet: on loopback."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

LOOPBACK = "127.0.0.1"
#: How long a store may take to answer once its port does.
STORE_TIMEOUT_S = 60.0


class Loopback(RendezvousHandler):
    """One node: a store on loopback, a fresh one for each attempt.

    The socket is bound before the store is made and handed to it, so no other process can take the port
    between; and ranks of a new attempt never read the addresses of those that have gone.

    Attributes:
        recalled: the ranks here are to leave because of what happened on another node.
    """

    def __init__(self, on_beat: Callable[[], None]) -> None:
        self.recalled = False
        self._on_beat = on_beat
        self._store: TCPStore | None = None

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        store = self._store = serve(listening(LOOPBACK, 0), LOOPBACK)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, store.port))

    def num_nodes_waiting(self) -> int:
        """Say how many nodes wait to join. Torch asks whenever it has found every rank alive."""
        self._on_beat()
        return 0

    def tell_failure(self, told: dict[str, Any]) -> list[dict[str, Any]]:
        """Tell the other nodes of a failure here, and return what all have told."""
        return [told]

    def part(self) -> None:
        """Take leave of the other nodes, all of whose ranks have ended well."""

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
    """Return a socket that listens at `host` alone, at a free port if `port` is 0."""
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
    """Return a store that serves on `server`, which it takes over, and is its own client through `host`."""
    port = server.getsockname()[1]
    timeout = timedelta(seconds=STORE_TIMEOUT_S)
    return TCPStore(host, port, None, True, timeout, False, master_listen_fd=server.detach())
