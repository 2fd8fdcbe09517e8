"""What reductions and gathers of numbers, tensors, nested data and objects give, alike on one rank and on several."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from plugframe import CollectiveMismatchError, Lite, PlugframeWarning, SettingError
from plugframe.hooks.world import World
from plugframe.lite.reductions import is_dropped, operation
from ranks import run_checks

# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("SUM", "sum"),
        ("avg", "mean"),
        ("ReduceOp.MAX", "max"),
        (dist.ReduceOp.SUM, "sum"),
        (dist.ReduceOp(dist.ReduceOp.MIN), "min"),
        (dist.ReduceOp.AVG, "mean"),
        (dist.ReduceOp.PRODUCT, "product"),
    ],
)
def test_reductions_go_by_torchs_names_too(given: Any, name: str) -> None:
    """A name in any case, and torch's own operations."""
    assert operation(given) == name


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("prod", "'prod' is not a reduction. Did you mean 'product'?"),
        ("median", "'median' is not a reduction"),
        (dist.ReduceOp.BAND, "reduce_op=ReduceOp.BAND is not a reduction"),
        (None, "reduce_op=None is not a reduction"),
        (sum, "is not a reduction"),
    ],
)
def test_other_reductions_are_refused_by_name(given: Any, says: str) -> None:
    """The message has what was asked for, the closest match and what there is."""
    with pytest.raises(SettingError, match=r"Use one of 'sum', 'mean'") as error:
        operation(given)
    assert says in str(error.value)


# ---------------------------------------------------------------------- on one rank and on two

Check = Callable[[Lite], None]
CHECKS: list[Callable[[Any], None]] = []


def check(fn: Check) -> Check:
    @functools.wraps(fn)
    def run(lites: list[Lite]) -> None:
        for lite in lites:
            fn(lite)

    run.__qualname__ = fn.__name__
    CHECKS.append(run)
    globals()[fn.__name__] = run
    return run  # type: ignore[return-value]


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32)


@check
def numbers_keep_their_digits(lite: Lite) -> None:
    """Python's floats are float64; integers are exact, and so is their mean; a sum of bools counts."""
    n, r = lite.world_size, lite.global_rank
    for value, op, want, dtype in (
        (67128463.0, "sum", 67128463.0 * n, torch.float64),
        (1 / 3, "mean", 1 / 3, torch.float64),
        (r + 1, "mean", (n + 1) / 2, torch.float64),
        (2**53 + 1, "sum", (2**53 + 1) * n, torch.int64),
        (2**62 + 2**10, "mean", float(2**62 + 2**10), torch.float64),
        (-(2**63), "mean", -(2.0**63), torch.float64),
        (-r, "min", 1 - n, torch.int64),
        (True, "sum", n, torch.int64),
        (r == 0, "mean", 1 / n, torch.float64),
        (r == 0, "min", n == 1, torch.bool),
        (r == 0, "max", True, torch.bool),
        (2, "product", 2**n, torch.int64),
        (complex(0, r), "sum", complex(0, n * (n - 1) // 2), torch.complex128),
        (np.float64(0.1), "max", 0.1, torch.float64),
        (np.float32(0.5), "sum", 0.5 * n, torch.float32),
        (np.uint8(200), "sum", 200 * n, torch.int64),
        (np.bool_(True), "sum", n, torch.int64),
    ):
        for found in (lite.all_reduce(value, reduce_op=op), lite.all_reduce({"x": [value]}, reduce_op=op)["x"][0]):
            assert (found.item(), found.dtype, found.shape) == (want, dtype, ()), (value, op, found)
    if n > 1:
        with pytest.raises(SettingError, match=f"the sum {2**62 * n} is beyond int64"):
            lite.all_reduce(2**62, reduce_op="sum")
    with pytest.raises(SettingError, match=r"integers of 64 bits, got 1180591620717411303424: pass a float"):
        lite.all_reduce(2**70)


@check
def integers_do_not_wrap(lite: Lite) -> None:
    """Sums of small integer tensors are int64; means of all are float64; minimum and maximum keep the dtype."""
    n, r = lite.world_size, lite.global_rank
    for dtype in INTEGERS:
        for shape in ((), (2, 3), (100,)):
            top = torch.full(shape, torch.iinfo(dtype).max, dtype=torch.int64)
            mine = top.to(dtype)
            summed = lite.all_reduce(mine, reduce_op="sum")
            assert torch.equal(summed, top * n)
            assert summed.dtype is torch.int64
            assert torch.equal(mine, top.to(dtype)), "a sum in another dtype is not done in place"
            assert torch.equal(lite.all_reduce(mine), top.double())
            least = lite.all_reduce((top - r).to(dtype), reduce_op="min")
            assert torch.equal(least, (top - n + 1).to(dtype))
    for values in ([2**53 + 1, -(2**53) - 3, 7, -1, 0], [2**62, -(2**62), 2**32, -(2**32) + 1, 5]):
        whole = torch.tensor(values)
        mean = lite.all_reduce(whole + 2 * r)
        assert mean.dtype is torch.float64
        assert mean.tolist() == [float(v * n + n * (n - 1)) / n if abs(v) < 2**40 else float(v + n - 1) for v in values]
    flags = torch.tensor([True, r == 0, False])
    assert lite.all_reduce(flags, reduce_op="sum").tolist() == [n, 1, 0]
    assert lite.all_reduce(flags).tolist() == [1.0, 1 / n, 0.0]
    assert lite.all_reduce(flags.clone(), reduce_op="min").tolist() == [True, n == 1, False]
    assert lite.all_reduce(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2)


@check
def halves_are_added_up_in_float32(lite: Lite) -> None:
    """A sum of half precision is float32 and lies rounded in the tensor passed; a mean keeps the dtype."""
    n, r = lite.world_size, lite.global_rank
    for dtype, big in ((torch.bfloat16, 256.0), (torch.float16, 60000.0)):
        for size in (1, 300):
            mine = torch.full((size,), big if r == 0 else 1.0, dtype=dtype)
            found = lite.all_reduce(mine, reduce_op="sum")
            assert (found[0].item(), found.dtype) == (big + n - 1, torch.float32)
            assert torch.equal(mine, found.to(dtype))
            high = torch.full((size,), 60000.0, dtype=dtype)
            want = high.clone()
            assert lite.all_reduce(high) is high
            assert torch.equal(high, want)


@check
def nan_is_not_passed_over(lite: Lite) -> None:
    """A minimum or maximum is NaN where a rank has NaN, in tensors of any size."""
    r, n = lite.global_rank, lite.world_size
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for size in (2, 500):
            mine = torch.full((size,), float(r), dtype=dtype)
            mine[0] = torch.nan if r == 0 else 3.0
            for op, other in (("max", n - 1), ("min", 0)):
                found = lite.all_reduce(mine.clone(), reduce_op=op)
                assert found.isnan().tolist() == [True] + [False] * (size - 1)
                assert found[1].item() == other


@check
def tensors_are_reduced_in_place(lite: Lite) -> None:
    """A tensor without a graph is reduced in place and returned, also in nested data and strided; an array is not."""
    n, r = lite.world_size, lite.global_rank
    want = (n - 1) / 2
    mine = torch.full((2, 3), float(r))
    assert lite.all_reduce(mine) is mine
    assert mine.eq(want).all()
    columns = torch.full((2, 6), float(r))
    assert lite.all_reduce(columns[:, ::2])._base is columns
    assert columns.tolist() == [[want, r] * 3] * 2
    nested = {"a": torch.tensor(float(r)), "b": [torch.ones(2) * r]}
    assert lite.all_reduce(nested) is nested
    assert nested["b"][0].tolist() == [want, want]
    expanded = torch.tensor([float(r)]).expand(4)
    assert lite.all_reduce(expanded).tolist() == [want] * 4
    assert expanded.tolist() == [r] * 4
    with torch.inference_mode():
        inference = torch.full((2,), float(r))
    assert lite.all_reduce(inference) is inference
    assert inference.tolist() == [want] * 2
    array = np.full(2, float(r))
    assert lite.all_reduce(array).tolist() == [want] * 2
    assert array.tolist() == [r] * 2
    weight = torch.nn.Parameter(torch.full((2,), float(r)))
    with torch.no_grad():
        assert lite.all_reduce(weight) is weight
    assert weight.tolist() == [want] * 2
    conjugate = torch.tensor([complex(0, r)]).conj()
    assert lite.all_reduce(conjugate, reduce_op="sum").tolist() == [complex(0, -n * (n - 1) / 2)]


@check
def gradients_flow_through_reductions(lite: Lite) -> None:
    """A tensor with a graph stays as it is, and the new one has the gradients of one process."""
    n, r = lite.world_size, lite.global_rank
    every = torch.arange(1.0, n + 1).view(n, 1).repeat(1, 2)
    for op, whole in (
        ("sum", lambda x: x.sum(0)),
        ("mean", lambda x: x.mean(0)),
        ("max", lambda x: x.amax(0)),
        ("product", lambda x: x.prod(0)),
    ):
        x = every.clone().requires_grad_()
        (n * whole(x).pow(2).sum()).backward()  # the sum of what every rank makes of it
        mine = every[r].clone().requires_grad_()
        graph = mine * 1.0
        found = lite.all_reduce(graph, reduce_op=op)
        found.pow(2).sum().backward()
        assert torch.equal(graph.detach(), every[r])
        torch.testing.assert_close(mine.grad, x.grad[r])
    half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    lite.all_reduce(half, reduce_op="sum").sum().backward()
    assert half.grad is not None
    assert half.grad.tolist() == [n, n]


@check
def a_result_that_is_dropped_is_told_of(lite: Lite) -> None:
    """A call for its effect alone, of what cannot be reduced in place, is warned of; no other is."""
    with pytest.warns(PlugframeWarning, match=r"could not reduce this in place, .* write x = lite.all_reduce\(x\)"):
        lite.all_reduce(torch.ones(2, dtype=torch.uint8), reduce_op="sum")
    with pytest.warns(PlugframeWarning, match=r"It has a graph: pass x.detach\(\)"):
        lite.all_reduce(torch.nn.Parameter(torch.ones(2)))
    lite.all_reduce(torch.ones(2))
    lite.all_reduce(1)
    _ = lite.all_reduce(torch.ones(2, dtype=torch.uint8), reduce_op="sum")
    assert lite.all_reduce(torch.ones(2, dtype=torch.uint8), reduce_op="sum").tolist() == [lite.world_size] * 2


class Pair(NamedTuple):
    one: Any
    other: Any


@dataclass
class Metrics:
    loss: Any
    names: Any


@check
def nested_data_goes_by_key(lite: Lite) -> None:
    """Dictionaries with their keys in another order on each rank give the same, in the order of each rank."""
    n, r = lite.world_size, lite.global_rank
    items = [("b", torch.tensor([10.0 + r])), ("a", {1: r, "1": 5.0}), (2, [torch.tensor(r), True])]
    data = dict(items if r % 2 else items[::-1])
    found = lite.all_gather(data)
    assert list(found) == list(data)
    assert found["b"].tolist() == [[10.0 + rank] for rank in range(n)]
    assert found["a"][1].tolist() == found[2][0].tolist() == list(range(n))
    assert found["a"]["1"].tolist() == [5.0] * n
    summed = lite.all_reduce(data, reduce_op="sum")
    assert summed["b"].item() == 10 * n + n * (n - 1) / 2
    assert (summed["a"]["1"].item(), summed[2][1].item()) == (5.0 * n, n)
    mixed = lite.all_reduce({"accuracy": 0 if r else 0.5}, reduce_op="sum")["accuracy"]
    assert (mixed.item(), mixed.dtype) == (0.5, torch.float64)
    named = lite.all_gather(Pair(one=Metrics(loss=r, names="x"), other=()))
    assert isinstance(named, Pair)
    assert named.one.loss.tolist() == list(range(n))
    assert named.one.names == ["x"] * n


@check
def objects_are_gathered_as_lists(lite: Lite) -> None:
    """A string, None or any other object becomes the list of those of the ranks; as_object takes all data as one."""
    n, r = lite.world_size, lite.global_rank
    assert lite.all_gather(f"rank {r}") == [f"rank {rank}" for rank in range(n)]
    assert lite.all_gather(None) == [None] * n
    found = lite.all_gather({"name": f"{r}", "seen": {r}, "loss": 0.1, "text": np.array(["a"])})
    assert found["name"] == [str(rank) for rank in range(n)]
    assert found["seen"] == [{rank} for rank in range(n)]
    assert found["loss"].tolist() == [0.1] * n
    assert [each.tolist() for each in found["text"]] == [["a"]] * n
    whole = lite.all_gather([torch.ones(r), "x"] * r, as_object=True)
    assert [len(each) for each in whole] == [2 * rank for rank in range(n)]


@check
def gathers_take_any_tensor(lite: Lite) -> None:
    """Strided, empty, 0-d, bool and complex tensors, and those with the conjugate bit, are stacked as they are."""
    n = lite.world_size
    for tensor in (
        torch.arange(6.0).view(2, 3).t(),
        torch.ones(2, 0),
        torch.tensor(True),
        torch.tensor([True, False]).expand(3, 2),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor(2**64 - 1, dtype=torch.uint64),
    ):
        found = lite.all_gather(tensor)
        assert (found.shape, found.dtype) == ((n, *tensor.shape), tensor.dtype)
        assert all(row.tolist() == tensor.tolist() for row in found)


@check
def other_data_is_an_error_on_every_rank(lite: Lite) -> None:
    """Other keys, lengths and types are told with those of each rank, on every rank, and the next call works."""
    if lite.world_size == 1:
        return
    r = lite.global_rank
    one = torch.ones(1)
    for mine, says in (
        ({"loss": 1.0, "even": 10.0} if r == 0 else {"loss": 1.0, "odd": 20.0}, r"'even', 'loss' .*'loss', 'odd' keys"),
        ([one] if r == 0 else [one, one], r"data is a list of 1 on rank 0; a list of 2 on rank 1"),
        ({"a": [one] if r else one}, r"data\['a'\]"),
        ({"a": one if r == 0 else None}, r"data\['a'\] is a tensor \(1,\) float32 on rank 0; object on rank 1"),
        ({"a": torch.ones(1 + r)}, r"data\['a'\] is a tensor \(1,\) float32 on rank 0; a tensor \(2,\) float32"),
        ({"a": one.double() if r else one}, r"data\['a'\] .* float64 on rank 1"),
        ({} if r == 0 else {"a": one}, "no keys on rank 0; a mapping with 'a' key on rank 1"),
        ({f"key {number}": 1.0 for number in range(100 + r)}, r"data\['key 100'\] is not there on rank 0; float on"),
        (one if r == 0 else None, "do not agree on a collective"),
        (one if r == 0 else {"a": one}, "do not agree on a collective"),
    ):
        with pytest.raises(CollectiveMismatchError, match=says):
            lite.all_gather(mine)
    for mine, kinds in (
        ({"a": 1.0 if r == 0 else "x"}, (CollectiveMismatchError, SettingError)),
        ({"a": 1 if r == 0 else 2**70}, (CollectiveMismatchError, SettingError)),
        (torch.ones(2, dtype=torch.uint8 if r else torch.int8), (CollectiveMismatchError,) * 2),
        (torch.ones(2, dtype=torch.uint8 if r else torch.int64), (CollectiveMismatchError,) * 2),
        (torch.ones(2, dtype=torch.bfloat16 if r else torch.float32), (CollectiveMismatchError,) * 2),
        (torch.ones((2, 3) if r else (3, 2), dtype=torch.int64), (CollectiveMismatchError,) * 2),
    ):
        for op in ("sum", "mean", "max"):
            with pytest.raises(kinds[r]):
                lite.all_reduce(mine, reduce_op=op)
    assert lite.all_reduce(1.0, reduce_op="sum").item() == lite.world_size


@check
def what_cannot_be_sent_is_an_error_on_every_rank(lite: Lite) -> None:
    """An object that cannot be pickled is an error on all ranks; broadcast ignores the objects of other ranks."""
    if lite.world_size == 1:
        return
    first = lite.global_rank == 0
    for call in (
        lambda: lite.broadcast(Unsendable() if first else None),
        lambda: lite.broadcast({"a": [Unsendable()]} if first else None),
        lambda: lite.all_gather(Unsendable() if first else 1 and "x"),
        lambda: lite.all_gather({"a": Unsendable() if first else "x"}),
    ):
        with pytest.raises(CollectiveMismatchError, match="no copies"):
            call()
    assert lite.broadcast(7 if first else Unsendable()) == 7


class Unsendable:
    def __reduce__(self) -> Any:
        raise TypeError("no copies")


def ones(world: World) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def opened() -> Any:
        with Lite(accelerator="cpu", strategy="ddp", devices=world.world_size, timeout_s=60.0) as lite:
            lite.launch()
            yield [lite]

    return opened()


@pytest.fixture(scope="module", params=[2])
def outcome(request: pytest.FixtureRequest) -> dict[str, str]:
    return run_checks(request.param, ones, CHECKS)


@pytest.mark.parametrize("name", [each.__name__ for each in CHECKS])
def test_on_two_ranks(outcome: dict[str, str], name: str) -> None:
    """Each check above holds on two ranks."""
    assert not outcome[name], outcome[name]


@pytest.mark.parametrize("strategy", ["single", "ddp"])
@pytest.mark.parametrize("name", [each.__name__ for each in CHECKS])
def test_on_one_rank(name: str, strategy: str) -> None:
    """Each check above holds on one rank, with and without a process group."""
    with Lite(accelerator="cpu", strategy=strategy, devices=1) as lite:
        lite.launch()
        next(each for each in CHECKS if each.__name__ == name)([lite])


def test_a_statement_is_told_from_an_expression() -> None:
    """What is done with the result is read from the caller's code, in every form of a call."""
    found: list[bool] = []

    def call(*args: Any, **kwargs: Any) -> None:
        import sys

        found.append(is_dropped(sys._getframe(1)))

    call()
    call(1, a=2)
    call(*[1], **{"a": 2})
    x = call()
    y = [call() for _ in range(1)]
    assert call() is x is y[0]
    assert found == [True, True, True, False, False, False]
