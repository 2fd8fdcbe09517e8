"""The ring: every rank sends to the next one and receives from the previous one at the same time."""

from __future__ import annotations

import ctypes
import hmac
import secrets
import select
import socket
import time
from typing import Any

from torch import Tensor

#: Bytes of the token that authenticates a neighbour.
_TOKEN = 16


class Ring:
    """The connections of one rank.

    Attributes:
        rank: rank of this process in the ring.
        size: number of ranks.
        sent_bytes: bytes sent so far.
    """

    def __init__(self, store: Any, rank: int, size: int, *, timeout_s: float, address: str) -> None:
        self.rank, self.size, self.sent_bytes = rank, size, 0
        self._timeout_s = timeout_s
        self._sockets: list[socket.socket] = []
        if size == 1:
            return
        deadline = time.monotonic() + timeout_s
        with socket.create_server((address, 0)) as server:
            token = secrets.token_bytes(_TOKEN)
            port = server.getsockname()[1]
            store.set(f"ring/{rank}", f"{address} {port} {token.hex()}")
            host, port, next_token = store.get(f"ring/{(rank + 1) % size}").decode().split()
            next_rank = socket.create_connection((host, int(port)), timeout=timeout_s)
            self._sockets.append(next_rank)
            next_rank.sendall(bytes.fromhex(next_token))
            previous_rank = self._accept(server, token, deadline)
            self._sockets.append(previous_rank)
        for each in self._sockets:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.setblocking(False)

    def _accept(self, server: socket.socket, token: bytes, deadline: float) -> socket.socket:
        """Accept the connection of the previous rank; reject callers without the token."""
        while True:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                caller, _ = server.accept()
            except TimeoutError:
                raise RuntimeError(
                    f"Rank {(self.rank - 1) % self.size} did not connect to rank {self.rank} of the ring within "
                    f"{self._timeout_s:g} s."
                ) from None
            caller.settimeout(5.0)
            try:
                authenticated = hmac.compare_digest(caller.recv(_TOKEN, socket.MSG_WAITALL), token)
            except OSError:
                authenticated = False
            if authenticated:
                return caller
            caller.close()

    def exchange(self, out: Tensor | None, into: Tensor | None) -> None:
        """Send `out` to the next rank while receiving `into` from the previous one; both contiguous, on the CPU.

        Raises:
            RuntimeError: if a neighbour has left, or nothing was transferred within the timeout.
        """
        outgoing, incoming = _bytes(out), _bytes(into)
        self.sent_bytes += len(outgoing)
        next_rank, previous_rank = self._sockets
        while outgoing or incoming:
            poll = select.poll()
            if outgoing:
                poll.register(next_rank, select.POLLOUT)
            if incoming:
                poll.register(previous_rank, select.POLLIN)
            ready = {number for number, _ in poll.poll(1000 * self._timeout_s)}
            if not ready:
                raise RuntimeError(f"Rank {self.rank} transferred nothing over the ring for {self._timeout_s:g} s.")
            try:
                if next_rank.fileno() in ready:
                    outgoing = outgoing[next_rank.send(outgoing) :]
                if previous_rank.fileno() in ready:
                    count = previous_rank.recv_into(incoming)
                    if count == 0:
                        raise ConnectionResetError
                    incoming = incoming[count:]
            except ConnectionError:
                raise RuntimeError(f"A neighbour of rank {self.rank} has left the ring.") from None

    def close(self) -> None:
        """Close the connections without waiting."""
        while self._sockets:
            self._sockets.pop().close()


def _bytes(tensor: Tensor | None) -> memoryview:
    if tensor is None or not tensor.numel():
        return memoryview(b"")
    # The caller keeps the tensor alive while this is used. Tensor.numpy() would need NumPy.
    count = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * count).from_address(tensor.data_ptr())).cast("B")
