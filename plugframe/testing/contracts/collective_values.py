"""Collective contract checks of values: shapes, dtypes, reductions, objects and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plugframe.errors import CollectiveMismatchError, SettingError, UnsupportedError
from plugframe.testing.contracts.batches import rule
from plugframe.testing.contracts.collective_group import Group
from plugframe.testing.contracts.collective_rules import GRADIENTS, INPUTS, LAW_5, MISMATCH, OBJECTS, REDUCED, REFUSED
from plugframe.testing.contracts.running import broken, one_line


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have equal shapes, dtypes and bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    flat = [each.detach().cpu().contiguous().view(-1) for each in (one, other)]
    return not one.numel() or torch.equal(flat[0].view(torch.uint8), flat[1].view(torch.uint8))


@rule(LAW_5)
def gathering_stacks(group: Group) -> None:
    """all_gather returns (ranks, *shape) in rank order, in every dtype, on one rank too."""
    for dtype in group.settings.dtypes:
        each = [torch.tensor([[0, 1, rank], [rank, 1, 0]]).to(dtype) for rank in range(group.size)]
        found = group.gather(each[group.rank].to(group.device))
        if found.shape != (group.size, 2, 3):
            broken(LAW_5, f"all_gather of (2, 3) on {group.size} ranks gave {tuple(found.shape)}")
        if not same(found, torch.stack(each)):
            broken(LAW_5, f"all_gather of {dtype} gave {found.dtype} {found.tolist()}, not the ranks' in their order")


def _shapes() -> dict[str, Tensor]:
    base = torch.arange(12.0).view(3, 4)
    return {
        "a number": torch.tensor(1.5),
        "an empty tensor": torch.empty(0),
        "a tensor with an empty dimension": torch.empty(2, 0, 3),
        "a transposed tensor": base.t(),
        "every other column": base[:, ::2],
        "an expanded tensor": base[0].expand(2, 4),
    }


@rule(LAW_5)
def shapes_are_kept(group: Group) -> None:
    """0-d, empty and strided tensors keep their shape in every call; the input does not change."""
    for what, made in _shapes().items():
        tensor = made.to(group.device)
        before = tensor.clone()
        results = {
            "all_gather": group.gather(tensor)[group.size - 1],
            "all_reduce": group.reduce(tensor, "mean"),
            "broadcast": group.broadcast(tensor, group.size - 1),
        }
        for call, found in results.items():
            if found.shape != made.shape:
                broken(LAW_5, f"{call} of {what}, {tuple(made.shape)}, gave {tuple(found.shape)}")
            if not torch.equal(found.cpu(), made):
                broken(REDUCED, f"{call} of {what} that is equal on all ranks changed the values")
            if not found.is_contiguous() or found.device != tensor.device:
                broken(INPUTS, f"{call} of {what} gave strides {found.stride()} on {found.device}")
            if found.numel() and found.data_ptr() == tensor.data_ptr():
                broken(INPUTS, f"{call} of {what} returned the memory of its input")
        for op in ("sum", "mean", "max"):
            group.reduce(tensor, op).add_(1.0)
            group.gather(tensor).add_(1.0)
            group.broadcast(tensor).add_(1.0)
        if not torch.equal(tensor, before):
            broken(INPUTS, f"{what} was changed by a collective, or by writing to its result")


@rule(REDUCED)
def reductions_compute_their_names(group: Group) -> None:
    """sum, mean, avg, min, max and product, of all_reduce and reduce_scatter, keep the dtype."""
    for dtype in (d for d in group.settings.dtypes if d not in (torch.bool,) and not d.is_complex):
        each = torch.stack([torch.tensor([2, 3 + rank]) for rank in range(group.size)]).to(dtype)
        wide = each.double() if dtype.is_floating_point else each.long()
        want = {"sum": wide.sum(0), "min": wide.amin(0), "max": wide.amax(0), "product": wide.prod(0)}
        if dtype.is_floating_point:
            want["mean"] = want["avg"] = wide.mean(0)
        mine = each[group.rank].to(group.device)
        for op, expected in want.items():
            found = group.reduce(mine, op)
            if not same(found, expected.to(dtype)):
                wanted = expected.to(dtype)
                broken(REDUCED, f"{op} of {dtype} gave {found.dtype} {found.tolist()}, not {wanted.tolist()}")
            rows = torch.stack([mine + row for row in range(group.size)])
            row = group.scatter(rows, op)
            if row.shape != mine.shape:
                broken(LAW_5, f"reduce_scatter of {tuple(rows.shape)} gave {tuple(row.shape)}")
            whole = torch.stack([group.reduce(mine + row, op) for row in range(group.size)])
            if not same(row, whole[group.rank]):
                broken(REDUCED, f"reduce_scatter({op}) of {dtype} gave rank {group.rank} {row.tolist()}")


@rule(REDUCED)
def bools_stay_bools(group: Group) -> None:
    """Bools keep their dtype: the maximum is 'any', the minimum 'all'."""
    if torch.bool not in group.settings.dtypes:
        return
    mine = group.tensor([True, group.rank == 0, False])
    for op, expected in {"max": [True, True, False], "min": [True, group.size == 1, False]}.items():
        found = group.reduce(mine, op)
        if found.dtype is not torch.bool or found.tolist() != expected:
            broken(REDUCED, f"{op} of bools gave {found.dtype} {found.tolist()}, not {expected}")


@rule(LAW_5)
def a_broadcast_gives_the_sources(group: Group) -> None:
    """Every rank gets the tensor of rank src, bit for bit, and its own does not change."""
    for src in range(group.size):
        for dtype in group.settings.dtypes:
            mine = group.tensor([[1, group.rank]]).to(dtype)
            before = mine.clone()
            found, expected = group.broadcast(mine, src), torch.tensor([[1, src]]).to(dtype)
            if not same(found, expected):
                broken(LAW_5, f"broadcast of {dtype} from rank {src} gave {found.dtype} {found.float().tolist()}")
            if not same(mine, before):
                broken(INPUTS, f"broadcast from rank {src} wrote into the tensor of rank {group.rank}")


def raises(group: Group, kind: type[Exception], rule: str, what: str, call: Callable[[], Any]) -> str:
    """Check that a call raises an error of one line on this rank, and return its message."""
    try:
        found = call()
    except UnsupportedError:
        raise  # reported by who calls the check
    except kind as error:
        if "\n" in str(error).strip():
            broken(rule, f"{what}: the message has several lines: {error}")
        return str(error)
    except Exception as error:  # noqa: BLE001 - reported as it is
        broken(rule, f"{what}: on rank {group.rank} it raised {one_line(error)}, not a {kind.__name__}")
    broken(rule, f"{what}: on rank {group.rank} it gave {found!r}")


@rule(MISMATCH)
def unequal_tensors_are_an_error_on_every_rank(group: Group) -> None:
    """Unequal shapes, dtypes or numbers of dimensions are the same error on all ranks; the next call works."""
    if group.size == 1:
        return
    different = {
        "unequal shapes": torch.ones(2 + group.rank),
        "unequal dtypes": torch.ones(2, dtype=(torch.float32, torch.float64)[group.rank % 2]),
        "unequal numbers of dimensions": torch.ones((2, 3) if group.rank else (6,)),
    }
    calls: dict[str, Callable[[Tensor], Any]] = {
        "all_gather": group.gather,
        "all_reduce": lambda tensor: group.reduce(tensor, "sum"),
        "broadcast": group.broadcast,
    }
    for what, made in different.items():
        for name, call in calls.items():
            tensor = made.to(group.device)
            said = raises(group, CollectiveMismatchError, MISMATCH, f"{name} of {what}", lambda: call(tensor))  # noqa: B023
            everyone = group.objects(said)
            if len(set(everyone)) != 1:
                broken(MISMATCH, f"{name} of {what} has different messages on the ranks: {' / '.join(everyone)}")
            if not all(str(rank) in said for rank in range(group.size)):
                broken(MISMATCH, f"{name} of {what}: the message does not list the ranks: {said}")
    if group.reduce(group.tensor([1.0]), "sum").tolist() != [float(group.size)]:
        broken(MISMATCH, "after the errors the next collective gave a wrong result")


@rule(REFUSED)
def wrong_reductions_are_refused(group: Group) -> None:
    """An unknown reduction, and the mean of integers, are refused on every rank."""
    for op, tensor in (("median", torch.ones(1)), ("mean", torch.ones(1, dtype=torch.int64))):
        what = f"{op!r} of {tensor.dtype}"
        said = raises(group, SettingError, REFUSED, what, lambda: group.reduce(tensor.to(group.device), op))  # noqa: B023
        if op not in said:
            broken(REFUSED, f"{what}: the message does not name it: {said}")
    rows = torch.ones(group.size + 1, device=group.device)
    said = raises(
        group, SettingError, REFUSED, f"reduce_scatter of {group.size + 1} rows", lambda: group.scatter(rows, "sum")
    )
    if str(group.size) not in said:
        broken(REFUSED, f"reduce_scatter of {group.size + 1} rows: the message does not say how many it takes: {said}")


@rule(GRADIENTS)
def gradients_flow_back(group: Group) -> None:
    """With sync_grads an input gets the sum over ranks of the gradients of its row; without it, none."""
    x = group.tensor([1.0, 2.0]).requires_grad_(True)
    weights = torch.arange(1.0, 1 + 2 * group.size, device=group.device).view(group.size, 2) * (group.rank + 1)
    found = group.gather(x, sync_grads=True)
    if found.shape != (group.size, 2):
        broken(LAW_5, f"all_gather(sync_grads=True) of (2,) gave {tuple(found.shape)}")
    if not found.requires_grad:
        broken(GRADIENTS, "the result of all_gather(sync_grads=True) does not require gradients")
    (found * weights).sum().backward()  # type: ignore[no-untyped-call]
    total = sum(range(1, group.size + 1))
    expected = [total * (1.0 + 2 * group.rank), total * (2.0 + 2 * group.rank)]
    if x.grad is None or x.grad.tolist() != expected:
        broken(GRADIENTS, f"rank {group.rank} got {None if x.grad is None else x.grad.tolist()}, not {expected}")
    if group.gather(x).requires_grad or group.reduce(x, "sum").requires_grad:
        broken(GRADIENTS, "without sync_grads a result requires gradients, which no rank would send back")


@rule(OBJECTS)
def objects_travel(group: Group) -> None:
    """Objects of any size are gathered in rank order, and broadcast."""
    mine = {"rank": group.rank, "text": "x" * (1 + 1000 * group.rank), "t": torch.arange(group.rank)}
    everyone = group.objects(mine)
    if [each["rank"] for each in everyone] != list(range(group.size)) or len(everyone[-1]["text"]) != len(
        "x"
    ) + 1000 * (group.size - 1):
        broken(OBJECTS, f"all_gather_object gave {[each['rank'] for each in everyone]}")
    for src in range(group.size):
        found = group.plugin.collective_broadcast_object(obj=mine, src=src, group=None)
        if found["rank"] != src or found["t"].tolist() != list(range(src)):
            broken(OBJECTS, f"broadcast_object from rank {src} gave rank {found['rank']}'s")
