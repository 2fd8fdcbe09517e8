"""Save a state whose tensors are divided among ranks: every value once, and errors on all ranks alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from plugframe.checkpoint.error_codes import first_error, pack_error
from plugframe.checkpoint.partition import Piece, common, digest, portion, table
from plugframe.checkpoint.tree import split_stored
from plugframe.errors import CheckpointError

if TYPE_CHECKING:
    from plugframe.hooks.context import Context

_T = TypeVar("_T")


class Divided(NamedTuple):
    """A state divided among ranks.

    Attributes:
        pieces: what this rank writes, by tensor name.
        structure: of this rank's state, for `join`.
        shapes: shape and dtype of every tensor in the structure.
    """

    pieces: dict[str, Piece]
    structure: Any
    shapes: dict[str, tuple[torch.Size, torch.dtype]]


def write_shards(
    context: Context,
    path: str,
    state: Mapping[str, Any],
    *,
    write: Callable[[dict[str, Piece]], _T],
    commit: Callable[[Any, list[_T]], object],
    dtypes: Collection[torch.dtype] | None = None,
) -> None:
    """Write what each rank holds of `state`, then commit it on rank 0. Every rank must call it.

    For `checkpoint_save` of a format whose descriptor lists ``provides=("sharded",)``. Of each tensor every element is
    in one piece of one rank; large tensors that all ranks have in full are spread over the ranks, and of values that
    differ, rank 0's count.

    Args:
        context: of the plugin.
        path: for messages.
        state: this rank's state, in which tensors may be a ``DTensor``.
        write: called on every rank with its pieces by tensor name; returns what `commit` needs to know, plain values.
        commit: called on rank 0 once all ranks have written, with the state's structure (for `join`) and what `write`
            returned, by rank. The checkpoint should be complete and visible only from here on.
        dtypes: that the format supports; see `split`.

    Raises:
        CheckpointError: on all ranks with the same message, if any of them failed. Files that `write` made are the
            caller's to remove.

    Example:
        ``write_shards(self.context, path, state, write=self._write_file, commit=self._write_index)``
    """
    divided = divide_state(context, path, state, dtypes=dtypes)
    what = f"cannot write {path}"
    _, written = on_all_ranks(context, what, lambda: write(divided.pieces), summarize=lambda result: result)

    def finish() -> None:
        if context.world.global_rank == 0:
            commit(divided.structure, written)

    on_all_ranks(context, what, finish)


def divide_state(
    context: Context, path: str, state: Mapping[str, Any], *, dtypes: Collection[torch.dtype] | None = None
) -> Divided:
    """Return the pieces of `state` that this rank writes. Every rank must call it.

    Args:
        context: of the plugin.
        path: for messages.
        state: this rank's state.
        dtypes: that the format supports; see `split`.

    Raises:
        CheckpointError: on all ranks, if the state of any cannot be saved, or ranks hold shards of different tensors.
    """

    def split() -> tuple[dict[str, Any], Any]:
        return split_stored(state, dtypes=dtypes, where=path, sharded=True)

    (tensors, structure), digests = on_all_ranks(
        context, f"cannot write {path}", split, summarize=lambda result: digest(table(result[0])).hex()
    )
    shared = set(table(tensors))
    if len(set(digests)) > 1:
        # A rank with an empty shard cannot detect a shared tensor: then no rank checks.
        tensors, structure = split_stored(state, dtypes=dtypes, where=path, sharded=True, aliases=False)
        shared = common(_exchange(context, table(tensors)), where=path)
    rank, num_ranks = context.world.global_rank, context.world.world_size
    pieces = portion(tensors, shared, rank=rank, num_ranks=num_ranks)
    shapes = {name: (torch.Size(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return Divided(pieces, structure, shapes)


def on_all_ranks(
    context: Context, what: str, act: Callable[[], _T], *, summarize: Callable[[_T], Any] = lambda _: None
) -> tuple[_T, list[Any]]:
    """Run `act` on all ranks; return its result on this rank, and a summary from each. Every rank must call it.

    Args:
        context: of the plugin.
        what: the beginning of the message of an error that is no `CheckpointError`: ``"cannot write runs/last"``.
        act: may communicate only if it cannot fail before.
        summarize: returns plain values from the result.

    Raises:
        CheckpointError: on all ranks, of the same class and message, if `act` raised on any.
    """
    results: list[_T] = []
    failure: CheckpointError | None = None
    rank = context.world.global_rank
    try:
        results.append(act())
    except CheckpointError as error:
        failure = error
    except Exception as error:  # noqa: BLE001 the other ranks wait for the outcome
        text = " ".join((str(error) or "no message").split()).rstrip(".")
        failure = CheckpointError(f"{what} (rank {rank}): {type(error).__name__}: {text}.")
        failure.__cause__ = error
    everyone = _exchange(context, (pack_error(failure), [summarize(result) for result in results]))
    failed = first_error([packed for packed, _ in everyone], failure, rank)
    if failed is not None:
        raise failed
    return results[0], [summaries[0] for _, summaries in everyone]


def _exchange(context: Context, obj: Any) -> Sequence[Any]:
    if context.world.world_size == 1:
        return [obj]
    everyone: Sequence[Any] = context.hooks.collective_all_gather_object(obj=obj, group=None)
    return everyone
