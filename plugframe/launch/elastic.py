"""Where the launchers of a number of nodes meet that may change: by torch's own rendezvous."""

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
from plugframe.launch.nodes import ElsewhereError, Nodes, Patient
from plugframe.launch.rendezvous import listening, serve
from plugframe.launch.signed import Signed
from plugframe.utils.environment import environment

#: How long a round waits for more nodes once the fewest are there.
LAST_CALL_S = 5.0
#: How long a launcher may be silent before the others go on without it.
LOST_S = 20.0
#: How often a launcher tells torch's rendezvous that it lives, and how many such words may fail.
_KEEP_ALIVE_S, _KEEP_ALIVE_WORDS = 5, 3
_SAY_S = 10.0


class Elastic(Nodes):
    """Any number of nodes within bounds, which may come and go: each time all ranks start again, numbered anew.

    Whichever launcher is at the endpoint serves the store, and must stay; the others may leave.
    """

    _host, _typed = "the endpoint", "--rdzv-endpoint"

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
        self._lacks = False  # a node of this round has been lost

    def next_rendezvous(self) -> RendezvousInfo:
        if self._torch is None:
            self._torch = self._join()
        info = self._next_round(self._torch)
        self._control = info.store  # whose keys begin with the number of the round
        self._heard, self._lacks = {}, False
        if (info.rank, info.world_size) != (self._node_rank, self._num_nodes):
            self._node_rank, self._num_nodes = info.rank, info.world_size
            self._say(f"the job has {info.world_size} node{'s' if info.world_size > 1 else ''} now")
        store = Patient("plugframe/agents", info.store, self._look_closely)
        return RendezvousInfo(store, info.rank, info.world_size, self._ranks_meet())

    def num_nodes_waiting(self) -> int:
        self._on_beat()
        if time.monotonic() < self._next_look:
            return 0
        self._next_look = time.monotonic() + 0.5
        self._look()
        assert self._torch is not None
        try:
            waiting = self._torch.num_nodes_waiting()
        except RendezvousConnectionError as error:
            raise self._unreachable(error) from error
        self.recalled = waiting > 0 or self.recalled
        return int(self.recalled)

    def shutdown(self) -> bool:
        if self._torch is not None:
            with suppress(RendezvousConnectionError):  # the store has gone, and the job with it
                self._torch.shutdown()
            self._torch = None
        return super().shutdown()

    def _join(self) -> DynamicRendezvousHandler:
        """Serve the store, if the endpoint is here and nobody does yet; else reach it."""
        store: Store
        try:
            store = serve(listening(self._address, self._port), self._address)
            self._hosts = True
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
                text = (
                    f"The endpoint {self._where()} cannot be used ({error.strerror or error}): correct {self._typed}."
                )
                raise UsageError(text) from None
            self._hosts = False
            store = self._reach()
        bounds = f"{self._min_nodes}:{self._max_nodes}"
        theirs = Signed(store).compare_set("plugframe/nodes", "", bounds).decode()
        if theirs != bounds:
            raise UsageError(f"This node was started with --num-nodes={bounds}, another with --num-nodes={theirs}.")
        run_id = self.get_run_id()
        handler: DynamicRendezvousHandler = DynamicRendezvousHandler.from_backend(
            run_id=run_id,
            store=store,
            # The backend's values are pickles: only those of launchers with this job's token are opened.
            backend=C10dRendezvousBackend(cast("Store", Signed(store)), run_id),
            min_nodes=self._min_nodes,
            max_nodes=self._max_nodes,
            timeout=RendezvousTimeout(
                join=timedelta(seconds=self._timeout_s), last_call=timedelta(seconds=LAST_CALL_S)
            ),
            keep_alive_interval=_KEEP_ALIVE_S,
            keep_alive_max_attempt=_KEEP_ALIVE_WORDS,
        )
        return handler

    def _next_round(self, handler: DynamicRendezvousHandler) -> RendezvousInfo:
        least = f"{self._min_nodes} node{'s' if self._min_nodes > 1 else ''}"
        try:
            with self._saying(f"waiting at {self._where()} until there are {least} at least"), _no_shared_store():
                return handler.next_rendezvous()
        except RendezvousTimeoutError:
            raise UsageError(
                f"Fewer than {least} came to {self._where()} within {self._timeout_s:g} s: start them with this "
                "--rdzv-endpoint, or lower the first number of --num-nodes."
            ) from None
        except RendezvousClosedError:
            raise ElsewhereError("") from None  # whoever closed it has told why
        except RendezvousConnectionError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: RendezvousConnectionError) -> Exception:
        """Return what torch's error means: that the store has gone, or that a stranger has written into it."""
        forged = error.__cause__
        return forged if isinstance(forged, EnvironmentMismatchError) else self._without_main()

    def _ranks_meet(self) -> RendezvousStoreInfo:
        """Return where the ranks of this round meet: in a store of their own, beside node 0's launcher."""
        try:
            if self._node_rank == 0:
                with socket.create_connection((self._address, self._port), timeout=self._timeout_s) as line:
                    address = line.getsockname()[0]  # the one by which the others can reach this node
                self._store = serve(listening(address, 0), address)
                self.words.set("plugframe/ranks", f"{address} {self._store.port}")
            told = Patient("plugframe", self.control, self._look_closely).get("ranks")
            address, port = self.words.opened("plugframe/ranks", told).decode().split()
        except (OSError, DistError) as error:
            raise self._without_main() from error
        return RendezvousStoreInfo(address, int(port))

    def _on_lost(self, node: int) -> None:
        if not self._lacks:
            self._say(f"node {node} has not been heard of for {LOST_S:g} s: the others go on without it")
        self._lacks = self.recalled = True

    def _lost_s(self) -> float:
        return LOST_S

    def _lost_node(self) -> int | None:
        return self._silent_node()  # each for itself: any node may be the one that is lost

    def _look_closely(self) -> None:
        """See `_look`; what waits for all nodes does not wait for one that is lost."""
        self._look()
        if self._lacks:
            raise ElsewhereError("A node was lost while the others waited for it.")

    @contextmanager
    def _saying(self, text: str) -> Iterator[None]:
        """Say what is waited for every so often: torch waits in silence."""
        done, start = threading.Event(), time.monotonic()

        def say() -> None:
            while not done.wait(_SAY_S):
                waited_s = time.monotonic() - start
                print(
                    f"plugframe: {text}, {waited_s:.0f} of {self._timeout_s:g} s at most", file=sys.stderr, flush=True
                )

        thread = threading.Thread(target=say, name="plugframe-saying", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _tell(self, told: dict[str, Any]) -> None:
        super()._tell(told)
        if self._torch is not None:
            self._torch.set_closed()  # so that nobody begins another round


def _no_shared_store() -> AbstractContextManager[None]:
    """Keep torch from making a store for the ranks: it would tell its address in the first round alone."""
    return environment({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
