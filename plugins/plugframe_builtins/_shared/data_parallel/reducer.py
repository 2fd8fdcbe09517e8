"""Average gradients over ranks during a backward, independent of the forward.

torch's ``DistributedDataParallel`` ties a backward to the preceding forward: a second backward, parameters
frozen in between, loss terms without a forward and second derivatives raise there, or stay local to each rank. Here
a gradient is averaged once accumulated, and averaging an average again does not change it: so any number of
backwards may add to it, from any graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import get_gradient_edge

from plugframe.errors import UnsupportedError
from plugframe_builtins._shared.data_parallel.buckets import Bucket, Send, make_buckets
from plugframe_builtins._shared.data_parallel.settings_digest import SettingsDigest
from plugframe_builtins._shared.data_parallel.sparse import average_sparse

Named = Sequence[tuple[str, nn.Parameter]]


class Backward:
    """The running backward of all models: ranks must send the buckets of several models in one order.

    Attributes:
        inside: whether the caller runs `finish` at the end; otherwise an autograd callback does.
        settings_digest: check that travels with the gradients, or None.
    """

    def __init__(self) -> None:
        self.inside = False
        self.settings_digest: SettingsDigest | None = None
        self._reducers: list[Reducer] = []

    def run(self, call: Callable[..., None], **arguments: Any) -> None:
        """Run a backward, and average its gradients."""
        self.abandon()  # one that has failed
        self.inside = True
        try:
            call(**arguments)
            self.finish()
        finally:
            self.inside = False
            self.abandon()

    def join(self, reducer: Reducer) -> None:
        """Add a reducer whose first gradient is accumulated."""
        if not self._reducers and not self.inside:
            # Private, but torch's DDP and FSDP2 end a backward with it (torch 2.13).
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)
        self._reducers.append(reducer)

    def advance(self) -> None:
        """Send the buckets that are ready, reducer by reducer."""
        for reducer in self._reducers:
            if not reducer.send_ready():
                return

    def finish(self) -> None:
        """Send the remaining buckets, and wait for all."""
        reducers, self._reducers = self._reducers, []
        try:
            with torch.no_grad():
                for reducer in reducers:
                    reducer.send_all()
                for reducer in reducers:
                    reducer.receive()
        finally:
            for reducer in reducers:
                reducer.running = False
        if self.settings_digest is not None:
            self.settings_digest.settle()

    def abandon(self) -> None:
        """Reset after a failed backward."""
        for reducer in self._reducers:
            reducer.running = False
        self._reducers.clear()


class Reducer:
    """Average the gradients of one model's parameters.

    Args:
        group: the process group.
        backward: shared by all reducers of a session.
        cap_bytes: size of a full bucket.
        as_views: whether gradients are views of the buckets.
        send: sends a bucket in compressed form.

    Attributes:
        averages: whether the running backward averages gradients.
        local: indices of parameters with gradients not averaged yet.
        running: whether the running backward computed a gradient here.
    """

    def __init__(
        self,
        group: Any,
        backward: Backward,
        *,
        cap_bytes: float,
        as_views: bool,
        make_send: Callable[[], Send] | None,
    ) -> None:
        self._group = group
        self._backward = backward
        self._cap_bytes = cap_bytes
        self._as_views = as_views
        self._make_send = make_send
        self._send: Send = self._send_uncompressed
        self._factor = 1.0 / dist.get_world_size(group)
        self.averages = True
        self.running = False
        self.local: set[int] = set()
        self._handles: dict[int, Any] = {}
        self._nodes: dict[int, Any] = {}
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[int, Bucket] = {}
        self._sparse: list[nn.Parameter] = []
        self._arrived: set[int] = set()
        # Ids of parameters whose gradient arrived once, or several times, in an earlier backward. They outlive a
        # freezing of the parameter; a reused id costs at most an early send, or an error.
        self._steady: set[int] = set()
        self._repeated: set[int] = set()
        self._next = 0

    def watch(self, parameters: Named, sparse: set[int]) -> None:
        """Average the gradients of these parameters, and no others, from now on.

        Args:
            parameters: trainable ones by name, in the order of the model.
            sparse: ids of those whose gradients are sparse.
        """
        dense = [(name, p) for name, p in parameters if id(p) not in sparse and p.numel()]
        self._sparse = [p for _, p in parameters if id(p) in sparse]
        self._buckets = make_buckets(dense, self._cap_bytes)
        self._take_along()
        for bucket in self._buckets:
            bucket.early = self._steady.issuperset(map(id, bucket.parameters))
        self._bucket_of = {id(p): bucket for bucket in self._buckets for p in bucket.parameters}
        if self._make_send is not None:
            self._send = self._make_send()
        self._forget()
        for _, parameter in parameters:
            key = id(parameter)
            # After accumulation and all user hooks: the result of the hooks is averaged.
            self._nodes[key] = node = get_gradient_edge(parameter).node
            self._handles[key] = node.register_hook(_firing(weakref.ref(self), key))

    @property
    def checks_settings(self) -> bool:
        """Whether a bucket carries the check of optimizer settings."""
        return any(bucket.settings_digest is not None for bucket in self._buckets)

    def _take_along(self) -> None:
        """Choose a bucket to carry the settings check: uncompressed, with sums that the host can read."""
        for bucket in self._buckets if self._make_send is None else ():
            first = bucket.parameters[0]
            if first.device.type == "cpu" and first.dtype in (torch.float32, torch.float64):
                bucket.settings_digest = self._backward.settings_digest
                return

    def close(self) -> None:
        """Stop averaging."""
        self._forget()
        self._buckets, self._sparse = [], []
        self._bucket_of.clear()
        self._group = self._send = None  # type: ignore[assignment]

    def _forget(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._nodes.clear()
        self.running = False

    def arrived(self, key: int) -> None:
        """Record that the gradient of a parameter is accumulated."""
        if not self.averages:
            self.local.add(key)
            return
        if not self.running:
            self._begin()
        bucket = self._bucket_of.get(key)
        if bucket is None:  # a sparse one, or an empty one
            return
        if key not in self._arrived:
            self._arrived.add(key)
            bucket.waiting -= 1
            if not bucket.waiting:
                self._backward.advance()
            return
            # Reentrant checkpointing may add to a shared parameter's gradient several times in one backward.
        self._repeated.add(key)
        if bucket.work is not None:
            index = [id(parameter) for parameter in bucket.parameters].index(key)
            raise UnsupportedError(
                f"A backward has added to the gradient of parameter {bucket.names[index]!r} twice, and the ones before "
                "it did not: it was sent to the other ranks already. Reentrant checkpointing of a parameter that is "
                "used in several places does this: use checkpoint(..., use_reentrant=False)."
            )

    def _begin(self) -> None:
        self.running = True
        self._arrived.clear()
        self._next = 0
        for bucket in self._buckets:
            bucket.begin()
        self._backward.join(self)

    def _learn(self) -> None:
        """Send buckets early from now on if each gradient arrived exactly once.

        Ranks may send a bucket at different times, as long as the order of buckets is the same.
        """
        for bucket in self._buckets:
            if not bucket.early and not bucket.waiting:
                keys = {id(parameter) for parameter in bucket.parameters}
                bucket.early = self._repeated.isdisjoint(keys)
                if bucket.early:
                    self._steady |= keys

    def send_ready(self) -> bool:
        """Send buckets in order, up to the first that waits for a gradient; return whether all were sent."""
        buckets = self._buckets
        while self._next < len(buckets) and buckets[self._next].early and not buckets[self._next].waiting:
            self._send_one(buckets[self._next])
            self._next += 1
        return self._next == len(buckets)

    def send_all(self) -> None:
        """Send the remaining buckets: parameters without a gradient here may have one on another rank."""
        for bucket in self._buckets[self._next :]:
            self._send_one(bucket)
        self._next = len(self._buckets)

    def _send_one(self, bucket: Bucket) -> None:
        if torch.is_grad_enabled():  # in a backward that makes a graph alone: torch's context managers take time
            with torch.no_grad():
                self._send_one(bucket)
            return
        bucket.fill(self._factor)
        bucket.work = self._send(bucket)

    def _send_uncompressed(self, bucket: Bucket) -> Any:
        return dist.all_reduce(bucket.flat, group=self._group, async_op=True)

    def receive(self) -> None:
        """Wait, and make the gradients the means. Gradients are disabled meanwhile."""
        for bucket in self._buckets:
            bucket.work.wait()
        for bucket in self._buckets:
            if bucket.settings_digest is not None:
                bucket.settings_digest.read(bucket.slots)
            bucket.write_back(as_views=self._as_views)
            bucket.work = None
        for parameter in self._sparse:
            average_sparse(parameter, self._group)
        if self.local:
            self.local -= self._bucket_of.keys() | {id(p) for p in self._sparse}
        self._learn()


def _firing(reference: weakref.ref[Reducer], key: int) -> Callable[..., None]:
    def fire(*_: Any) -> None:
        reducer = reference()
        if reducer is not None:
            reducer.arrived(key)

    return fire
