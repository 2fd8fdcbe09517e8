"""Metrics over ranks: the samples of a data set gathered in its order, and weighted means."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plugframe.data.loader_pass import LoaderPass
from plugframe.data.sharding import UNKNOWN
from plugframe.errors import CollectiveMismatchError, OrderError, SettingError
from plugframe.lite import collectives
from plugframe.lite.ordered_tree import walk
from plugframe.lite.running_total import Weights
from plugframe.utils.rank_text import ranks_text

if TYPE_CHECKING:
    from plugframe.data.batch_weights import BatchWeights
    from plugframe.lite.lite import Lite

_CALL = "gather_for_metrics()"
_OUTSIDE = (
    f"{_CALL} is called outside of a loop over a loader that was set up, so there is no telling which samples its "
    "argument belongs to: set the loader up with lite.setup_dataloaders(), and call it in the loop for each batch; or "
    "use lite.all_gather()."
)
_AHEAD = (
    f"{_CALL}: several batches were read before this call, and no model was called in between, so there is no telling "
    "which of them the argument belongs to: read one batch at a time, and call it for each."
)
_UNSHARDED = (
    f"{_CALL}: lite.setup_dataloaders() does not divide the samples of this loader (a DistributedSampler, an __iter__ "
    "of its own, shards of a stream, or use_distributed_sampler=False), so their order is unknown: leave the division "
    "to plugframe, or use lite.all_gather()."
)
_ALONE = (
    f"{_CALL}: fewer samples than ranks are left for the last batch, so that a rank has none, and it was not called "
    "for the batches before: call it for each batch of the loop. A data set needs at least as many samples as ranks."
)
_TOTALS = (
    "reduce_mean() is called in a loop with the weights of all batches so far, and a rank has no samples for this last "
    "batch, but repeats those of another: pass value and weight of the current batch, or call it once, after the loop."
)
_INNER = (
    f"{_CALL} is called again for one batch of a training loop, and a model ran in evaluation mode in between: an "
    "inner loop over a loader that was not set up reads all samples on each rank. Call lite.setup_dataloaders() on it."
)


@dataclass(frozen=True)
class _Leaf:
    """A value with one row for each sample.

    Attributes:
        value: a tensor, or a list.
        rows: number of its rows.
        what: for comparing it over ranks.
        array: whether it was an array.
    """

    value: Any
    rows: int
    what: str
    array: bool = False


def gather_for_metrics(lite: Lite, data: Any) -> Any:
    """Return the rows of all ranks in the order of the data set; see `Lite.gather_for_metrics`."""
    context = lite._started("gather_for_metrics")
    hooks, weights = lite._hooks, lite._job_state.weights
    index, count = hooks.strategy_data_shard()
    weights.communicated, weights.unreduced_at = True, None
    if count == 1:
        leaves = _leaves(data)
        return (
            walk(lambda path, value: _result(leaves[path], leaves[path].value), data, lists=False) if leaves else data
        )
    header: dict[str, Any] = {"index": index, "error": ""}
    leaves = {}
    try:
        leaves = _leaves(data)
        loader_pass = _current_pass(weights, leaves)
        alone = _is_alone(loader_pass)
        header |= _place(loader_pass, leaves)
        header["what"] = {path: leaf.what for path, leaf in leaves.items()}
    except (SettingError, OrderError) as error:
        header["error"] = str(error)
        hooks.collective_all_gather_object(obj=header, group=None)
        raise
    if alone:  # the others would not join
        raise OrderError(_ALONE)
    headers = hooks.collective_all_gather_object(obj=header, group=None)
    _compare(headers)
    order = _order(headers)
    # Ranks that read the same samples have the same results: the first of each is taken.
    largest = max(each["rows"] for each in headers)

    def one(path: str, value: Any) -> Any:
        leaf = leaves[path]
        kept = leaf.value[: header["rows"]]
        if leaf.what == "a list":
            everyone = hooks.collective_all_gather_object(obj=collectives.off_device(kept), group=None)
            return collectives.on_device([everyone[rank][row] for _, row, rank in order], context.device)
        padded = torch.cat([kept, kept.new_zeros((largest - len(kept), *kept.shape[1:]))])
        stacked = hooks.collective_all_gather(tensor=padded.contiguous(), group=None, sync_grads=False)
        rows = torch.tensor([rank * largest + row for _, row, rank in order], device=stacked.device, dtype=torch.int64)
        return _result(leaf, stacked.flatten(0, 1).index_select(0, rows))

    return walk(lambda path, value: value if path not in leaves else one(path, value), data, lists=False)


def reduce_mean(lite: Lite, value: Any, weight: Any) -> Any:
    """Return the mean over ranks, weighted by samples; see `Lite.reduce_mean`."""
    context = lite._started("reduce_mean")
    hooks, weights = lite._hooks, lite._job_state.weights
    number = weight_number("reduce_mean", weight)
    totals: dict[str, float] = {}
    loader_pass = weights.open_passes[-1] if weights.open_passes else None
    # Not after an inner loop: it is a value of all its batches.
    if loader_pass is not None and loader_pass.share is not None and loader_pass.num_closed == weights.num_closed:
        loader_pass.gathered_at = loader_pass.position
        totals = _are_totals(loader_pass, number)
        if not loader_pass.share.weight:  # it repeats samples of another rank
            number = 0.0
            weights.on_weight_requested()
    weights.on_collective()

    def part(path: str, each: Any) -> Tensor:
        tensor = torch.as_tensor(each).detach()
        if not (tensor.is_floating_point() or tensor.is_complex()):
            tensor = tensor.double()
        # Not a product: a rank without samples may have computed 0 / 0.
        return tensor.to(_wide(tensor)) * number if number else torch.zeros_like(tensor, dtype=_wide(tensor))

    sums = {"weight": number, "value": walk(part, value), **totals}
    total = collectives.reduce(sums, "sum", hooks, None, context.device)
    if totals and float(total["totals"]):
        raise OrderError(_TOTALS)
    given: dict[str, Any] = {}
    walk(given.__setitem__, value)

    def mean(path: str, each: Tensor) -> Tensor:
        own, result = given[path], torch.div(each, total["weight"].to(each.device))
        return result.to(own.dtype) if isinstance(own, Tensor) and own.is_floating_point() else result

    return walk(mean, total["value"])


def _are_totals(loader_pass: LoaderPass, number: float) -> dict[str, float]:
    """Note the weight; where a rank has no samples, return whether its value is of all batches so far, not of one."""
    share = loader_pass.share
    assert share is not None
    if loader_pass.weights_given is None or loader_pass.position <= 1:
        loader_pass.weights_given = Weights(number)
    else:
        loader_pass.weights_given.add(number)
    if not share.partial:
        return {}
    return {"totals": float(not share.weight and loader_pass.weights_given.are_totals(share.size))}


def weight_number(call: str, weight: Any) -> float:
    """Return a weight as a number.

    Raises:
        SettingError: if it is none, or negative.
    """
    try:
        number = float(weight)
    except (TypeError, ValueError, RuntimeError):
        number = -1.0
    if not 0 <= number < float("inf"):
        raise SettingError(f"{call}(weight={weight!r}): it is a number of samples or tokens of this rank, 0 or above.")
    return number


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _leaves(data: Any) -> dict[str, _Leaf]:
    """Return the values with rows, by path.

    Raises:
        SettingError: for any other value, or unequal numbers of rows.
    """
    found: dict[str, _Leaf] = {}

    def look(path: str, value: Any) -> Any:
        if value is not None:
            found[path] = _leaf(path, value)
        return value

    walk(look, data, lists=False)
    if len({leaf.rows for leaf in found.values()}) > 1:
        texts = ", ".join(f"{leaf.rows} in x{path}" for path, leaf in found.items())
        raise SettingError(f"{_CALL} takes values with one row for each sample of the batch, got rows: {texts}.")
    return found


def _leaf(path: str, value: Any) -> _Leaf:
    if isinstance(value, list):
        return _Leaf(value, len(value), "a list")
    numpy = sys.modules.get("numpy")
    array = False
    if numpy is not None and isinstance(value, numpy.ndarray) and value.ndim:
        array = True
        try:
            value = torch.from_numpy(numpy.ascontiguousarray(value))
        except TypeError:
            raise SettingError(
                f"{_CALL}: x{path} is an array of dtype {value.dtype}: pass a list, value.tolist()."
            ) from None
    if not isinstance(value, Tensor) or not value.dim():
        what = "a number" if isinstance(value, (int, float, Tensor)) else f"of type {type(value).__name__}"
        raise SettingError(
            f"{_CALL}: x{path} is {what}, and has no row for each sample of the batch. Pass tensors or arrays with the "
            "batch as first dimension, lists with one entry for each sample, and dicts and tuples of those; for the "
            "mean of a loss use lite.reduce_mean(loss, weight=len(batch))."
        )
    if hasattr(value, "full_tensor"):
        raise SettingError(f"{_CALL}: x{path} is a {type(value).__name__}, which is sharded: pass x.full_tensor().")
    what = f"a tensor (rows, {', '.join(map(str, value.shape[1:]))}) {str(value.dtype).removeprefix('torch.')}"
    return _Leaf(value.detach(), len(value), what, array)


def _result(leaf: _Leaf, value: Any) -> Any:
    return value.cpu().numpy() if leaf.array else value


def _current_pass(weights: BatchWeights, leaves: dict[str, _Leaf]) -> LoaderPass:
    """Return the pass that the values belong to: the one read last; of several read side by side one that fits.

    Raises:
        OrderError: if there is none.
    """
    weights.update_passes()
    opened = [each for each in weights.open_passes if each.started]
    if not opened:
        raise OrderError(_OUTSIDE)
    rows = next((leaf.rows for leaf in leaves.values()), 0)
    fitting = [each for each in reversed(opened) if each.share is not None and _fits(each, rows)]
    return (fitting or opened[::-1])[0]


def _fits(loader_pass: LoaderPass, rows: int) -> bool:
    assert loader_pass.share is not None
    return loader_pass.share.size == rows or (loader_pass.unbatched and loader_pass.share.size == 1)


def _place(loader_pass: LoaderPass, leaves: dict[str, _Leaf]) -> dict[str, Any]:
    """Return where the rows of this rank belong, and record the call.

    Raises:
        OrderError: if that is unknown.
        SettingError: if the values do not have one row for each sample.
    """
    share = loader_pass.share
    if share is None or share.start == UNKNOWN:
        raise OrderError(_UNSHARDED)
    # Before the second batch is requested nothing is known of how a pass is read.
    if loader_pass.ahead and not loader_pass.at_first_batch:
        raise OrderError(_AHEAD)
    again = loader_pass.gathered_at == loader_pass.position
    weights: Any = loader_pass.weights
    if again and loader_pass.trains and weights.num_evaluations > loader_pass.num_evaluations:
        raise OrderError(_INNER)
    rows = next((leaf.rows for leaf in leaves.values()), share.size)
    if not _fits(loader_pass, rows):
        raise SettingError(
            f"{_CALL} takes values with one row for each sample, got {rows} rows for a batch of {share.size} samples. "
            "The batch is the first dimension of tensors; a list has one entry for each sample (pass several values as "
            "a tuple or dict); collate_fn must keep every sample."
        )
    if loader_pass.drops and not loader_pass.trains:
        raise SettingError(loader_pass.drops)
    loader_pass.gathered_at, loader_pass.num_evaluations = loader_pass.position, weights.num_evaluations
    if not share.weight:
        weights.on_weight_requested()
    return {
        "loader": (loader_pass.number, loader_pass.epoch, loader_pass.position),
        "rows": rows if share.weight else 0,
        "start": share.start,
        # An item that is a batch by itself has one position.
        "step": share.step if share.size == rows else 0,
    }


def _is_alone(loader_pass: LoaderPass) -> bool:
    """Return whether a rank without samples has left out the current batch."""
    share = loader_pass.share
    if share is None or not share.partial or loader_pass.trains or loader_pass.gathered_at:
        return False
    return not (loader_pass.even and loader_pass.position == 1)


def _compare(headers: list[dict[str, Any]]) -> None:
    """Raise on all ranks if the ranks do not gather the same.

    Raises:
        CollectiveMismatchError: naming the difference, or the error of another rank.
    """
    failed = [rank for rank, each in enumerate(headers) if each["error"]]
    if failed:
        raise CollectiveMismatchError(f"{_CALL} failed on {ranks_text(failed)}: {headers[failed[0]]['error']}")
    for key in ("loader", "what"):
        others = [rank for rank, each in enumerate(headers) if each[key] != headers[0][key]]
        if others:
            mine, other = headers[0][key], headers[others[0]][key]
            what = f"batch {mine[2]} of loader {mine[0]}" if key == "loader" else _text(mine)
            found = f"batch {other[2]} of loader {other[0]}" if key == "loader" else _text(other)
            raise CollectiveMismatchError(
                f"{_CALL} is called for {what} on rank 0, and for {found} on {ranks_text(others)}: pass the same on "
                "all ranks, of the same batch; pad other dimensions to equal sizes (lite.pad_across_processes)."
            )


def _text(what: dict[str, str]) -> str:
    return ", ".join(f"x{path}: {text}" for path, text in what.items())


def _order(headers: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """Return (position, row, rank) of every sample, in the order of the data set."""
    first = {each["index"]: rank for rank, each in reversed(list(enumerate(headers)))}
    found = []
    for rank in first.values():
        each = headers[rank]
        found += [(each["start"] + row * each["step"], row, rank) for row in range(each["rows"])]
    return sorted(found)
