"""Rendezvous of a varying number of nodes, on torch's dynamic rendezvous."""

from __future__ import annotations

import errno
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from typing import Any, cast

from torch.distributed import DistError, Store  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousInfo,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from plugframe.errors import EnvironmentMismatchError, UsageError
from plugframe.launch.nodes import ElsewhereError, InterruptibleStore, NodeRendezvous
from plugframe.launch.rendezvous import listening, serve
from plugframe.launch.signed import SignedStore
from plugframe.utils.environment import environment

#: How long a round waits for further nodes once the minimum has joined.
LAST_CALL_TIMEOUT_S = 5.0
#: How long a launcher may send no heartbeat before the others continue without it.
LOST_NODE_TIMEOUT_S = 20.0
#: Interval of the keep-alive messages to torch's rendezvous, and how many may be missed.
_KEEP_ALIVE_S, _KEEP_ALIVE_ATTEMPTS = 5, 3
_PROGRESS_INTERVAL_S = 10.0


class ElasticRendezvous(NodeRendezvous):
    """Rendezvous of `min_nodes` to `max_nodes` nodes that may join and leave: each change restarts all ranks.

    The launcher at the endpoint serves the store and must stay; the others may leave.
    """

    _host_name, _address_options = "the endpoint", "--rdzv-endpoint"

    def __init__(
        self,
        on_beat: Callable[[], None],
        *,
        address: str,
        port: int,
        min_nodes: int,
        max_nodes: int,
        timeout_s: float,
    ) -> None:
        super().__init__(on_beat, address=address, port=port, num_nodes=max_nodes, node_rank=-1, timeout_s=timeout_s)
        self._min_nodes, self._max_nodes = min_nodes, max_nodes
        self._torch: DynamicRendezvousHandler | None = None
        self._node_lost = False  # a node of this round is lost

    def next_rendezvous(self) -> RendezvousInfo:
        if self._torch is None:
            self._torch = self._join()
        info = self._next_round(self._torch)
        self._control_store = info.store  # its keys are prefixed with the number of the round
        self._heartbeats, self._node_lost = {}, False
        if (info.rank, info.world_size) != (self._node_rank, self._num_nodes):
            self._node_rank, self._num_nodes = info.rank, info.world_size
            self._log(f"the job has {info.world_size} node{'s' if info.world_size > 1 else ''} now")
        store = InterruptibleStore("plugframe/agents", info.store, self._check_all_nodes)
        return RendezvousInfo(store, info.rank, info.world_size, self._rank_store_info())

    def num_nodes_waiting(self) -> int:
        self._on_beat()
        if time.monotonic() < self._next_check:
            return 0
        self._next_check = time.monotonic() + 0.5
        self._check_nodes()
        assert self._torch is not None
        try:
            waiting = self._torch.num_nodes_waiting()
        except RendezvousConnectionError as error:
            raise self._unreachable(error) from error
        self.stop_requested = waiting > 0 or self.stop_requested
        return int(self.stop_requested)

    def shutdown(self) -> bool:
        if self._torch is not None:
            with suppress(RendezvousConnectionError):  # the store is gone, and the job with it
                self._torch.shutdown()
            self._torch = None
        return super().shutdown()

    def _join(self) -> DynamicRendezvousHandler:
        """Serve the store if the endpoint is on this host and still free; otherwise connect to it."""
        store: Store
        try:
            store = serve(listening(self._address, self._port), self._address)
            self._is_host = True
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
                text = (
                    f"Cannot listen at the endpoint {self._endpoint()} ({error.strerror or error}): "
                    f"correct {self._address_options}."
                )
                raise UsageError(text) from None
            self._is_host = False
            store = self._connect_to_host()
        bounds = f"{self._min_nodes}:{self._max_nodes}"
        theirs = SignedStore(store).compare_set("plugframe/nodes", "", bounds).decode()
        if theirs != bounds:
            raise UsageError(
                f"This node was started with --num-nodes={bounds}, another one with --num-nodes={theirs}: "
                "use the same value."
            )
        run_id = self.get_run_id()
        handler: DynamicRendezvousHandler = DynamicRendezvousHandler.from_backend(
            run_id=run_id,
            store=store,
            # The backend unpickles its values: accept only those of launchers with this job's token.
            backend=C10dRendezvousBackend(cast("Store", SignedStore(store)), run_id),
            min_nodes=self._min_nodes,
            max_nodes=self._max_nodes,
            timeout=RendezvousTimeout(
                join=timedelta(seconds=self._timeout_s), last_call=timedelta(seconds=LAST_CALL_TIMEOUT_S)
            ),
            keep_alive_interval=_KEEP_ALIVE_S,
            keep_alive_max_attempt=_KEEP_ALIVE_ATTEMPTS,
        )
        return handler

    def _next_round(self, handler: DynamicRendezvousHandler) -> RendezvousInfo:
        least = f"{self._min_nodes} node{'s' if self._min_nodes > 1 else ''}"
        try:
            with self._progress(f"waiting at {self._endpoint()} for at least {least}"), _no_shared_store():
                return handler.next_rendezvous()
        except RendezvousTimeoutError:
            raise UsageError(
                f"Fewer than {least} joined at {self._endpoint()} within {self._timeout_s:g} s: start more nodes with "
                "this --rdzv-endpoint, or lower the minimum in --num-nodes."
            ) from None
        except RendezvousClosedError:
            raise ElsewhereError("") from None  # the node that closed it has published the reason
        except RendezvousConnectionError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: RendezvousConnectionError) -> Exception:
        """Return the cause of torch's error: a lost store, or a value without this job's signature."""
        forged = error.__cause__
        return forged if isinstance(forged, EnvironmentMismatchError) else self._host_lost()

    def _rank_store_info(self) -> RendezvousStoreInfo:
        """Return the address of the store for the ranks of this round, served by node 0's launcher."""
        try:
            if self._node_rank == 0:
                with socket.create_connection((self._address, self._port), timeout=self._timeout_s) as line:
                    address = line.getsockname()[0]  # an address at which the other nodes reach this one
                self._store = serve(listening(address, 0), address)
                self.signed_store.set("plugframe/ranks", f"{address} {self._store.port}")
            value = InterruptibleStore("plugframe", self.control_store, self._check_all_nodes).get("ranks")
            address, port = self.signed_store.verify("plugframe/ranks", value).decode().split()
        except (OSError, DistError) as error:
            raise self._host_lost() from error
        return RendezvousStoreInfo(address, int(port))

    def _on_lost(self, node: int) -> None:
        if not self._node_lost:
            self._log(f"node {node} sent no heartbeat for {LOST_NODE_TIMEOUT_S:g} s: continuing without it")
        self._node_lost = self.stop_requested = True

    def _lost_timeout_s(self) -> float:
        return LOST_NODE_TIMEOUT_S

    def _find_lost_node(self) -> int | None:
        return self._silent_node()  # every node checks: any of them may be the lost one

    def _check_all_nodes(self) -> None:
        """Run `_check_nodes`, and raise if a node is lost that all others would wait for."""
        self._check_nodes()
        if self._node_lost:
            raise ElsewhereError("A node was lost during the rendezvous.")

    @contextmanager
    def _progress(self, text: str) -> Iterator[None]:
        """Print `text` with the time waited at intervals: torch's rendezvous waits without output."""
        done, start = threading.Event(), time.monotonic()

        def print_progress() -> None:
            while not done.wait(_PROGRESS_INTERVAL_S):
                waited_s = time.monotonic() - start
                print(
                    f"plugframe: {text}, {waited_s:.0f} of {self._timeout_s:g} s at most", file=sys.stderr, flush=True
                )

        thread = threading.Thread(target=print_progress, name="plugframe-saying", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _publish_failure(self, failure: dict[str, Any]) -> None:
        super()._publish_failure(failure)
        if self._torch is not None:
            self._torch.set_closed()  # so that no node begins another round


def _no_shared_store() -> AbstractContextManager[None]:
    """Stop torch from creating a store for the ranks: it would publish its address in the first round only."""
    return environment({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
