"""The contract of a collective: how ranks exchange tensors and objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from plugframe.errors import UnsupportedError
from plugframe.hooks.markers import provider

if TYPE_CHECKING:
    from torch import Tensor

    from plugframe.hooks.context import Context

#: Reductions that every collective supports. "avg" is torch's name for "mean".
ReduceOp = Literal["sum", "mean", "avg", "min", "max", "product"]


class CollectiveSpec(Protocol):
    """Hooks of the kind ``collective``. Every rank of the group must make the same calls in the same order.

    Only `collective_send` and `collective_recv` are calls of two ranks. `group` is None for all ranks, or a group from
    `collective_new_group`; `src` and `dst` are global ranks in a group too. Inputs are never modified: results are new
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

    @provider(since=2)
    def collective_send(self, tensor: Tensor, dst: int, tag: int, group: Any) -> None:
        """Send `tensor` to global rank `dst`, which must call `collective_recv`; return once it may be changed.

        Called on the two ranks of a message only, and not counted as a call of all ranks. It may wait for the recv:
        of two ranks that exchange tensors one sends first and the other receives first. A ring, in which every rank
        sends at once, is `collective_all_to_all` with sizes: ``input_sizes`` of 0 but for the next rank. No gradient
        flows back.

        Args:
            tensor: of any shape and dtype, dense.
            dst: a global rank of the group other than this one.
            tag: names the message, such as the number of a micro-batch: the recv must have the same.

        Raises:
            CollectiveMismatchError: on both ranks, if shape, dtype or tag differ from those of the recv.
            SettingError: if `dst` is this rank, or not in the group.

        Example:
            ``hooks.collective_send(tensor=activations, dst=rank + 1, tag=micro_batch, group=None)``
        """
        raise _missing("collective_send")

    @provider(since=2)
    def collective_recv(self, tensor: Tensor, src: int, tag: int, group: Any) -> Tensor:
        """Return the tensor that global rank `src` sends to this rank by `collective_send`.

        Args:
            tensor: gives shape, dtype and device, such as ``torch.empty(…)``: it is neither read nor written.
            src: a global rank of the group other than this one.
            tag: that of the send.

        Raises:
            CollectiveMismatchError: on both ranks, as for `collective_send`; never a partly received tensor.
            SettingError: if `src` is this rank, or not in the group.

        Example:
            ``x = hooks.collective_recv(tensor=torch.empty(8, 16), src=rank - 1, tag=micro_batch, group=None)``
        """
        raise _missing("collective_recv")

    @provider(since=2)
    def collective_all_to_all(
        self,
        tensor: Tensor,
        output_sizes: Sequence[int] | None,
        input_sizes: Sequence[int] | None,
        group: Any,
        sync_grads: bool,
    ) -> Tensor:
        """Send to each rank of the group its rows of `tensor`, and return the rows received, in rank order.

        Without sizes, `tensor` has shape ``(group size, *S)`` and row i goes to the i-th rank of the group; the result
        has the same shape, and its row i is from the i-th rank. With sizes, `tensor` has shape
        ``(sum(input_sizes), *S)``: the first ``input_sizes[0]`` rows go to the first rank, and so on. The result has
        shape ``(sum(output_sizes), *S)``. ``S`` and the dtype are equal on all ranks.

        Args:
            output_sizes: number of rows from each rank of the group, 0 included; None for an even split.
            input_sizes: number of rows for each rank of the group, 0 included; None for an even split. Both are
                given, or neither; ``input_sizes[j]`` of rank i is ``output_sizes[i]`` of rank j.
            sync_grads: whether gradients flow back: each row's gradient returns to the rank that sent the row. All
                ranks must then run backward.

        Raises:
            CollectiveMismatchError: on all ranks, if shapes, dtypes or sizes do not fit each other; never a result
                that is partly uninitialised.
            SettingError: if the sizes do not fit `tensor`, or its number of rows is not the group's size.

        Example:
            Of tokens that are sorted by the rank of their expert, first the numbers of rows, then the rows:
            ``counts = hooks.collective_all_to_all(tensor=torch.tensor(sent), output_sizes=None, input_sizes=None, …)``
            ``x = hooks.collective_all_to_all(tensor=x, output_sizes=counts.tolist(), input_sizes=sent, …)``
        """
        raise _missing("collective_all_to_all")

    @provider(since=2)
    def collective_scatter(self, tensor: Tensor, src: int, group: Any) -> Tensor:
        """Return this rank's row, of shape ``S``, of the `tensor` on global rank `src`.

        Args:
            tensor: on `src` of shape ``(group size, *S)``: row i is for the i-th rank of the group. On the other
                ranks it gives the shape ``S``, the dtype and the device of the result, as for `collective_recv`.

        Raises:
            CollectiveMismatchError: on all ranks, if the row's shape or dtype differs between ranks, or `src`'s tensor
                has another number of rows than the group has ranks; with one rank a SettingError.

        Example:
            ``row = hooks.collective_scatter(tensor=rows if rank == 0 else torch.empty(16), src=0, group=None)``
        """
        raise _missing("collective_scatter")

    @provider
    def collective_all_gather_object(self, obj: Any, group: Any) -> list[Any]:
        """Return every rank's object, in rank order. Objects are pickled between ranks of the job."""
        ...

    @provider(since=2)
    def collective_gather_object(self, obj: Any, dst: int, group: Any) -> list[Any] | None:
        """Return every rank's object on global rank `dst`, in rank order, and None elsewhere.

        Every rank of the group calls it. Objects are pickled between ranks of the job.

        Raises:
            SettingError: if `dst` is not in the group.
            CollectiveMismatchError: on all ranks, if the object of one cannot be pickled.

        Example:
            ``names = hooks.collective_gather_object(obj=socket.gethostname(), dst=0, group=None)``
        """
        raise _missing("collective_gather_object")

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


def _missing(hook: str) -> UnsupportedError:
    return UnsupportedError(
        f"The collective of this job was written for version 1 of the plugin contract, and has no {hook}: use another "
        "one, or upgrade its package."
    )
