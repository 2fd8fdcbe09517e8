"""The contract of a collective: how ranks exchange tensors and objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from plugframe.hooks.markers import provider

if TYPE_CHECKING:
    from torch import Tensor

    from plugframe.hooks.context import Context

#: Reductions that every collective supports. "avg" is torch's name for "mean".
ReduceOp = Literal["sum", "mean", "avg", "min", "max", "product"]


class CollectiveSpec(Protocol):
    """Hooks of the kind ``collective``. Every rank of the group must make the same calls in the same order.

    `group` is None for all ranks, or a group from `collective_new_group`. Inputs are never modified: results are new
    contiguous tensors on the input's device.
    """

    @provider
    def collective_setup(self, context: Context) -> None:
        """Connect the ranks. Called once on every rank, after the accelerator is set up.

        ``context.hooks.environment_store(...)`` returns the rendezvous store. A process group that exists already (the
        user's own) is used, and not destroyed at tear-down.
        """
        ...

    @provider
    def collective_teardown(self) -> None:
        """Undo `collective_setup`. Called once on every rank, also after an exception; must not block."""
        ...

    @provider
    def collective_all_gather(self, tensor: Tensor, group: Any, sync_grads: bool) -> Tensor:
        """Return the ranks' tensors stacked: shape ``(group size, *tensor.shape)``, group size 1 included.

        With `sync_grads` gradients flow back to every rank's input.

        Raises:
            CollectiveMismatchError: if shapes or dtypes differ between ranks, on all ranks, listing them.
        """
        ...

    @provider
    def collective_all_reduce(self, tensor: Tensor, op: ReduceOp, group: Any) -> Tensor:
        """Return the element-wise reduction over ranks: the same shape and dtype as `tensor`.

        "mean" of an integer tensor raises a `SettingError`.

        Raises:
            CollectiveMismatchError: if shapes or dtypes differ between ranks, on all ranks, listing them.
        """
        ...

    @provider
    def collective_reduce_scatter(self, tensor: Tensor, op: ReduceOp, group: Any) -> Tensor:
        """Reduce `tensor` of shape ``(group size, *S)`` over ranks and return this rank's row, of shape ``S``."""
        ...

    @provider
    def collective_broadcast(self, tensor: Tensor, src: int, group: Any) -> Tensor:
        """Return global rank `src`'s tensor; on every rank `tensor` has its shape and dtype."""
        ...

    @provider
    def collective_all_gather_object(self, obj: Any, group: Any) -> list[Any]:
        """Return every rank's object, in rank order. Objects are pickled between ranks of the job."""
        ...

    @provider
    def collective_broadcast_object(self, obj: Any, src: int, group: Any) -> Any:
        """Return global rank `src`'s object. It is pickled between ranks of the job."""
        ...

    @provider
    def collective_gather_later(self, values: Sequence[float]) -> Callable[[], Sequence[Sequence[float]]] | None:
        """Start an asynchronous gather of a few numbers per rank; return a function that waits for the result.

        Called on every rank in the same order, in the hot path: it must not block on other ranks or on a device.

        Args:
            values: the same number of values on all ranks, at most a few dozen.

        Returns:
            A function that returns the values of all ranks, indexed by rank; None if the collective cannot run this
            concurrently with other collectives.

        Example:
            ``work = dist.all_gather(rows, torch.tensor(values), async_op=True)``
        """
        ...

    @provider
    def collective_barrier(self, name: str, group: Any) -> None:
        """Return once every rank of the group has called it; `name` is for error messages."""
        ...

    @provider
    def collective_monitored_barrier(self, name: str, timeout_s: float) -> None:
        """Like `collective_barrier`, over all ranks, but name the ranks that did not call it within `timeout_s`.

        Raises:
            RuntimeError: naming the missing ranks.
        """
        ...

    @provider
    def collective_new_group(self, ranks: Sequence[int]) -> Any:
        """Return a group of those global ranks. Called on every rank of the job, members or not."""
        ...

    @provider
    def collective_process_group(self) -> Any:
        """Return the ``torch.distributed`` process group of all ranks, or None if this collective has none.

        Called by strategies that pass it to ``torch.distributed``.
        """
        ...
