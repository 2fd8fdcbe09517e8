"""The contract of a collective: how ranks exchange tensors and objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from plugframe.hooks.markers import provider

if TYPE_CHECKING:
    from torch import Tensor

    from plugframe.hooks.context import Context

#: Reductions every collective knows. "avg" is "mean" under torch's name.
ReduceOp = Literal["sum", "mean", "avg", "min", "max", "product"]


class CollectiveSpec(Protocol):
    """Hooks of the kind ``collective``. Every rank of the group must make the same calls in the same order.

    `group` is None for all ranks, or what `collective_new_group` returned. Inputs are never changed: results
    are new tensors, contiguous, on the input's device.
    """

    @provider
    def collective_setup(self, context: Context) -> None:
        """Connect the ranks. Called once on every rank, after the accelerator is set up.

        ``context.hooks.environment_store(...)`` gives the store they meet at. A process group that exists
        already (the user's own) is used, and left alone at tear-down.
        """
        ...

    @provider
    def collective_teardown(self) -> None:
        """Undo `collective_setup`. Called once on every rank, also after an exception; it must not wait."""
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

        "mean" of an integer tensor is refused (SettingError).

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
        """Begin to gather a few numbers of every rank, and return what waits for them.

        Called on every rank in the same order, in the hot path: it must not wait for other ranks nor for a device.

        Args:
            values: equally many on all ranks, at most some dozen.

        Returns:
            A function that returns the values of all ranks, by rank; None where this cannot be done beside everything
            else that is exchanged.

        Example:
            ``work = dist.all_gather(rows, torch.tensor(values), async_op=True)``
        """
        ...

    @provider
    def collective_barrier(self, name: str, group: Any) -> None:
        """Return once every rank of the group is here; `name` is for error messages."""
        ...

    @provider
    def collective_monitored_barrier(self, name: str, timeout_s: float) -> None:
        """Like `collective_barrier`, over all ranks, but name the ranks that did not come within `timeout_s`.

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

        Called by strategies that build on torch's own machinery.
        """
        ...
