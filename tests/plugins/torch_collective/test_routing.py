"""Messages, all-to-all, scatter and gather of objects: the torch collective on real ranks, and one rank."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from plugframe.base import Collective, check_split
from plugframe.errors import CollectiveMismatchError, SettingError, UnsupportedError
from plugframe.hooks.world import World
from plugframe_builtins._shared.torch_collective.splits import Split, check_sizes
from plugframe_builtins.single.one_rank import OneRank
from plugframe_builtins.torch_collective.collective import TorchCollective
from ranks import hooks_of, run_checks
from test_collective_torch import context_of, ranks_with_collective

#: Too many to travel along with the description of a call.
MANY = 1000


def send(c: Any, tensor: Tensor, dst: int, tag: int = 0, group: Any = None) -> None:
    c.collective_send(tensor=tensor, dst=dst, tag=tag, group=group)


def recv(c: Any, like: Tensor, src: int, tag: int = 0, group: Any = None) -> Tensor:
    found: Tensor = c.collective_recv(tensor=like, src=src, tag=tag, group=group)
    return found


def exchange(
    c: Any, tensor: Tensor, output: Any = None, mine: Any = None, group: Any = None, grads: bool = False
) -> Any:
    return c.collective_all_to_all(tensor=tensor, output_sizes=output, input_sizes=mine, group=group, sync_grads=grads)


def message(c: Any, call: Any, kind: type[Exception] = CollectiveMismatchError) -> str:
    """Return the error of a call, which is the same on all ranks."""
    with pytest.raises(kind) as error:
        call()
    texts = c.collective_all_gather_object(obj=str(error.value), group=None)
    assert len(set(texts)) == 1, texts
    return str(error.value)


# ---------------------------------------------------------------------- messages


def dtypes_that_no_backend_reduces_are_sent(c: Any) -> None:
    """Tensors travel as bytes: complex, float8, conjugated and negated ones arrive as they are."""
    values = torch.tensor([1 + 2j, 3 - 4j])
    tensors = [values, values.conj(), values.conj().imag, torch.ones(3).to(torch.float8_e4m3fn)]
    tensors += [each.repeat(MANY) for each in tensors]
    for tensor in tensors:
        if c.world.global_rank == 0:
            send(c, tensor, 1)
        else:
            found = recv(c, torch.empty(tensor.shape, dtype=tensor.dtype), 0)
            assert torch.equal(found.view(torch.uint8), tensor.resolve_conj().resolve_neg().view(torch.uint8))
            assert not found.is_conj()


def a_message_carries_no_gradient(c: Any) -> None:
    """A tensor that requires gradients is sent, and what is received does not require them."""
    x = torch.ones(3, requires_grad=True)
    if c.world.global_rank == 0:
        send(c, x * 2, 1)
    else:
        assert not recv(c, x, 0).requires_grad


def the_two_calls_of_a_message_are_compared(c: Any) -> None:
    """What differs is listed with both calls on both ranks, and the next message arrives."""
    rank, ones = c.world.global_rank, torch.ones(3)
    cases = {
        "rank 0: send(dst=1, tag=0) of (3,) float32 on cpu; rank 1: recv(src=0, tag=0) of (4,) float32": (
            torch.ones(4),
            0,
        ),
        "rank 1: recv(src=0, tag=0) of (3,) float64 on cpu. Give send and recv one tag": (ones.double(), 0),
        "send(dst=1, tag=0) of (3,) float32 on cpu; rank 1: recv(src=0, tag=7) of (3,)": (ones, 7),
        "rank 1: recv(src=0, tag=0) of (1000,) float32": (torch.ones(MANY), 0),
    }
    for says, (like, tag) in cases.items():
        said = message(c, (lambda: recv(c, like, 0, tag)) if rank else (lambda: send(c, ones, 1)))  # noqa: B023
        assert says in said
    sparse = ones.to_sparse()
    said = message(c, (lambda: recv(c, ones, 0)) if rank else (lambda: send(c, sparse, 1)))
    assert "float32 sparse_coo on cpu" in said
    with pytest.raises(SettingError, match=r"takes dense tensors, got torch.sparse_coo: use tensor.to_dense"):
        recv(c, sparse, 0) if rank else send(c, sparse, 1)
    if rank:
        assert recv(c, ones, 0).tolist() == [1.0, 1.0, 1.0]
    else:
        send(c, ones, 1)


def two_ranks_that_both_send_are_told_at_once(c: Any) -> None:
    """Two sends to each other, or two recvs, would wait for ever: both ranks raise."""
    other = 1 - c.world.global_rank
    start = time.monotonic()
    assert message(c, lambda: send(c, torch.ones(MANY), other)).endswith("Let one of them recv first.")
    assert message(c, lambda: recv(c, torch.ones(2), other)).endswith("Let one of them send first.")
    assert time.monotonic() - start < 10.0


def wrong_ends_of_a_message_are_refused(c: Any) -> None:
    """A rank does not send to itself, nor to a rank outside of the group."""
    rank = c.world.global_rank
    with pytest.raises(SettingError, match=f"dst={rank} is this rank: a message is for another one"):
        send(c, torch.ones(1), rank)
    with pytest.raises(SettingError, match="src=5 is not in this group, which has the ranks 0, 1 of the job"):
        recv(c, torch.ones(1), 5)


# ---------------------------------------------------------------------- all-to-all, scatter, gather of objects


def second_derivatives_of_an_all_to_all_are_right(c: Any) -> None:
    """The gradient of a gradient goes through the transpose again, with sizes and without."""
    rank = c.world.global_rank
    counts = [[2, 1], [0, 3]]
    for output, mine in ((None, None), ([counts[0][rank], counts[1][rank]], counts[rank])):
        rows = 2 if mine is None else sum(mine)
        x = torch.arange(1.0, 1.0 + rows).double().requires_grad_()
        y = exchange(c, x, output, mine, grads=True)
        (grad,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        assert torch.equal(grad, 3 * x.detach() ** 2)
        grad.sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, 6 * x.detach())


def calls_of_an_all_to_all_are_compared(c: Any) -> None:
    """Sizes that do not fit, refused ones, and gradients on some ranks only are the same error on all ranks."""
    rank, ones = c.world.global_rank, torch.ones(2, 2)
    said = message(c, lambda: exchange(c, ones, [1, 1], [2, 0] if rank else [1, 1]))
    assert (
        "rank 1 sends 2 rows to rank 0, whose output_sizes expect 1. Exchange the input_sizes by an all_to_all" in said
    )
    said = message(c, lambda: exchange(c, ones, [1, 1], [1, 2] if rank else [1, 1]))
    assert (
        "rank 1: all_to_all refused (all_to_all with input_sizes=[1, 2] takes shape (3, …), got (2, 2).) of (2" in said
    )
    assert "rank 0: all_to_all with sizes of (*, 2) float32 on cpu" in said
    said = message(c, lambda: exchange(c, ones.clone().requires_grad_(rank == 0), grads=True))
    assert "rank 0: all_to_all with gradients of (2, 2) float32 on cpu; rank 1: all_to_all of (2, 2)" in said
    said = message(c, lambda: exchange(c, ones.to_sparse() if rank else ones))
    assert "rank 1: all_to_all of (2, 2) float32 sparse_coo" in said
    with torch.no_grad():
        assert not exchange(c, ones.clone().requires_grad_(), grads=True).requires_grad


def what_is_scattered_is_compared(c: Any) -> None:
    """A stack with too many rows, and other sources, are the same error on all ranks."""
    rank = c.world.global_rank

    def scatter(stack: Tensor, row: Tensor, src: int = 0) -> Any:
        return c.collective_scatter(tensor=row if rank else stack, src=src, group=None)

    said = message(c, lambda: scatter(torch.ones(3, 2), torch.ones(2)))
    assert "rank 0: scatter(src=0) to 2 ranks of (3, 2) float32 on cpu; rank 1: scatter(src=0) of (2,)" in said
    said = message(c, lambda: scatter(torch.ones(2, 2), torch.ones(2, 2), src=rank))
    assert "rank 0: scatter(src=0) of (2,) float32 on cpu; rank 1: scatter(src=1) of (2,)" in said
    like = torch.full((MANY,), torch.nan)
    found = scatter(torch.ones(2, MANY), like)
    assert found.tolist() == [1.0] * MANY
    assert like.isnan().all() or rank == 0


def an_object_that_cannot_be_sent_is_told_to_all(c: Any) -> None:
    """The error is on all ranks, not only where the objects are gathered."""
    obj = (lambda: None) if c.world.global_rank else 1
    with pytest.raises(CollectiveMismatchError, match=r"Rank 1 could not send its object|cannot be sent"):
        c.collective_gather_object(obj=obj, dst=0, group=None)
    assert c.collective_gather_object(obj="x", dst=1, group=None) == (["x", "x"] if c.world.global_rank else None)


TWO = (
    dtypes_that_no_backend_reduces_are_sent,
    a_message_carries_no_gradient,
    the_two_calls_of_a_message_are_compared,
    two_ranks_that_both_send_are_told_at_once,
    wrong_ends_of_a_message_are_refused,
    second_derivatives_of_an_all_to_all_are_right,
    calls_of_an_all_to_all_are_compared,
    what_is_scattered_is_compared,
    an_object_that_cannot_be_sent_is_told_to_all,
)


# ---------------------------------------------------------------------- four ranks, and groups of two


def halves(c: Any) -> tuple[Any, list[int]]:
    """Return this rank's group, of the even or the odd ranks, and its members."""
    groups = [c.collective_new_group(ranks=ranks) for ranks in ([0, 2], [1, 3])]
    return groups[c.world.global_rank % 2], [[0, 2], [1, 3]][c.world.global_rank % 2]


def ranks_in_a_group_are_those_of_the_job(c: Any) -> None:
    """`src` and `dst` are global ranks; rows and objects are in the order of the group."""
    group, members = halves(c)
    rank, last = c.world.global_rank, members[-1]
    for many in (1, MANY):
        stack = torch.tensor([[10.0, 11.0]]).t().repeat(1, many) + last
        found = c.collective_scatter(tensor=stack if rank == last else stack[0], src=last, group=group)
        assert found[-1].item() == 10 + last + members.index(rank)
        objects = c.collective_gather_object(obj=str(rank) * many, dst=last, group=group)
        assert objects == ([str(each) * many for each in members] if rank == last else None)
        rows = torch.tensor([[100.0 * rank + each] for each in members]).repeat(1, many)
        assert exchange(c, rows, group=group)[:, -1].tolist() == [100.0 * each + rank for each in members]
        x = torch.full((many,), float(rank))
        if rank == last:
            send(c, x, members[0], group=group)
        else:
            assert recv(c, x, last, group=group)[-1].item() == last
        assert c.collective_broadcast(tensor=x, src=last, group=group)[-1].item() == last
    with pytest.raises(SettingError, match="dst=.* is not in this group, which has the ranks"):
        send(c, torch.ones(1), (rank + 1) % 4, group=group)


def sizes_of_a_group_are_compared(c: Any) -> None:
    """The error of sizes names ranks of the job, and stays in the group."""
    group, members = halves(c)
    if c.world.global_rank % 2 == 0:
        return
    mine = [1, 1] if c.world.global_rank == 1 else [0, 2]
    with pytest.raises(CollectiveMismatchError, match="rank 3 sends 0 rows to rank 1, whose output_sizes expect 1"):
        exchange(c, torch.ones(2, 3), [1, 1], mine, group=group)
    assert members == [1, 3]


def tokens_go_to_their_experts_and_back(c: Any) -> None:
    """Numbers of rows first, then the rows, experts without any included; gradients equal those of one process."""
    rank, size = c.world.global_rank, c.world.world_size
    generator = torch.Generator().manual_seed(rank)
    expert = torch.randint(0, size - 1, (17,), generator=generator).sort().values  # the last one gets none
    sent = torch.bincount(expert, minlength=size)
    counts = exchange(c, sent).tolist()
    x = torch.randn(17, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = exchange(c, x, counts, sent.tolist(), grads=True)
    assert tokens.shape == (sum(counts), 5)
    back = exchange(c, tokens * (rank + 1), sent.tolist(), counts, grads=True)
    assert torch.equal(back, x.detach() * (expert + 1).unsqueeze(1))
    (back**2).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * x.detach() * (expert + 1).unsqueeze(1) ** 2)


def a_pipeline_of_ranks_passes_on(c: Any) -> None:
    """Micro-batches go from rank to rank, while other ranks already make their next call of all ranks."""
    rank, last = c.world.global_rank, c.world.world_size - 1
    for micro_batch in range(3):
        x = torch.full((2, MANY), float(micro_batch))
        if rank > 0:
            x = recv(c, torch.empty(2, MANY), rank - 1, micro_batch)
        if rank < last:
            send(c, x + 1, rank + 1, micro_batch)
        else:
            assert x[0, 0].item() == micro_batch + last
    assert c.collective_all_reduce(tensor=torch.ones(1), op="sum", group=None).item() == last + 1


FOUR = (
    ranks_in_a_group_are_those_of_the_job,
    sizes_of_a_group_are_compared,
    tokens_go_to_their_experts_and_back,
    a_pipeline_of_ranks_passes_on,
)


@pytest.fixture(scope="module")
def reports() -> dict[str, str]:
    return {**run_checks(2, ranks_with_collective, TWO), **run_checks(4, ranks_with_collective, FOUR)}


@pytest.mark.parametrize("check", [check.__name__ for check in (*TWO, *FOUR)])
def test_on_ranks(reports: dict[str, str], check: str) -> None:
    """The check holds on every rank."""
    assert not reports[check], reports[check]


def test_what_gloo_does_not_send_from_a_device_is_copied_to_the_host() -> None:
    """Gloo would read a GPU's address as one of the host; NCCL sends from the GPU."""
    collective = TorchCollective()
    device = torch.device("meta")  # stands for a GPU
    for backend, found in (("gloo", "cpu"), ("nccl", "meta")):
        collective._use({"cpu": "gloo", "meta": backend})
        assert collective._zero_bytes(3, device).device.type == found
        assert collective._zero_bytes(3, torch.device("cpu")).device.type == "cpu"
    x = torch.empty(3, device=device)
    assert collective._route(x) is x


# ---------------------------------------------------------------------- one rank, and contract 1


def test_one_rank_has_the_shapes_of_many() -> None:
    """all_to_all keeps its rows, scatter takes the only one, gather_object gives a list; gradients flow."""
    one = OneRank()
    one.collective_setup(context=context_of(World()))
    c = hooks_of(one)
    x = torch.ones(1, 3, requires_grad=True)
    exchange(c, x, grads=True).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0, 1.0]]
    assert exchange(c, torch.ones(4, 2), [4], [4]).shape == (4, 2)
    assert exchange(c, torch.ones(0, 2), [0], [0]).shape == (0, 2)
    assert c.collective_scatter(tensor=torch.ones(1, 3), src=0, group=None).shape == (3,)
    assert c.collective_gather_object(obj=1, dst=0, group=None) == [1]


@pytest.mark.parametrize(
    ("hook", "arguments", "says"),
    [
        ("send", {"tensor": torch.ones(1), "dst": 0, "tag": 0}, "dst=0: this job has one rank, which cannot send to"),
        ("recv", {"tensor": torch.ones(1), "src": 0, "tag": 0}, "src=0: this job has one rank, which cannot receive"),
        ("scatter", {"tensor": torch.ones(2), "src": 0}, r"scatter over 1 rank takes shape \(1, …\), got \(2,\)"),
        ("scatter", {"tensor": torch.ones(1), "src": 1}, "src=1 is not a rank of this job, which has rank 0 only"),
        ("gather_object", {"obj": 1, "dst": 2}, "dst=2 is not a rank of this job"),
    ],
)
def test_one_rank_refuses_what_many_would(hook: str, arguments: dict[str, Any], says: str) -> None:
    """A message to oneself, a wrong number of rows and a rank that does not exist are errors on one rank too."""
    one = OneRank()
    one.collective_setup(context=context_of(World()))
    with pytest.raises(SettingError, match=says):
        getattr(one, f"collective_{hook}")(**arguments, group=None)


@pytest.mark.parametrize(
    ("tensor", "output", "mine", "says"),
    [
        (torch.ones(3), None, None, r"all_to_all over 2 ranks takes shape \(2, …\) without sizes, got \(3,\)"),
        (torch.ones(2), [1, 1], None, "takes both output_sizes= and input_sizes=, or neither"),
        (torch.ones(2), [1, 1], [1], r"input_sizes=\[1\] of all_to_all is not 2 numbers of rows"),
        (torch.ones(2), [3, -1], [1, 1], r"output_sizes=\[3, -1\] of all_to_all is not 2 numbers of rows from 0"),
        (torch.ones(2), [1, 1], [0.5, 1.5], r"input_sizes=\[0.5, 1.5\] of all_to_all is not 2 numbers"),
        (torch.ones(2), [1, 1], 2, "input_sizes=2 of all_to_all is not 2 numbers of rows"),
        (torch.ones(4), [1, 1], [1, 2], r"input_sizes=\[1, 2\] takes shape \(3, …\), got \(4,\)"),
        (torch.ones(()), [0, 0], [0, 0], r"takes shape \(0, …\), got \(\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tensor: Tensor, output: Any, mine: Any, says: str) -> None:
    """The message says what was given and what it takes."""
    with pytest.raises(SettingError, match=says):
        check_split(tensor, 2, output, mine)


def test_sizes_may_be_any_integers() -> None:
    """Numbers from a tensor are as good as integers."""
    assert check_split(torch.ones(3), 2, torch.tensor([0, 2]), [torch.tensor(1), 2]) == ([0, 2], [1, 2])  # type: ignore[arg-type]


def test_sizes_of_many_ranks_are_compared() -> None:
    """The first rank whose rows are not expected is named."""
    size = 40
    splits = [Split(output=[1] * size, input=[1] * size) for _ in range(size)]
    check_sizes(torch.stack([split.as_bytes() for split in splits]), range(size))
    splits[30].output[20] = 2
    with pytest.raises(CollectiveMismatchError, match="rank 120 sends 1 rows to rank 130, whose output_sizes expect 2"):
        check_sizes(torch.stack([split.as_bytes() for split in splits]), range(100, 100 + size))


CONTRACT_2 = {
    "send": {"tensor": torch.ones(1), "dst": 1, "tag": 0},
    "recv": {"tensor": torch.ones(1), "src": 1, "tag": 0},
    "all_to_all": {"tensor": torch.ones(1), "output_sizes": None, "input_sizes": None, "sync_grads": False},
    "scatter": {"tensor": torch.ones(1), "src": 0},
    "gather_object": {"obj": 1, "dst": 0},
}


class Acme(Collective):
    """A collective of contract 1, which has none of these hooks."""


@pytest.mark.parametrize("hook", CONTRACT_2)
def test_a_collective_of_contract_1_says_what_it_lacks(hook: str) -> None:
    """With more than one rank it raises, with its name and that of the hook, instead of one rank's result."""
    acme = Acme()
    with pytest.raises(
        UnsupportedError, match=f"The collective Acme does not implement collective_{hook}, and it is not"
    ):
        getattr(acme, f"collective_{hook}")(**CONTRACT_2[hook], group=None)
    context = context_of(World(world_size=2))
    context.names["collective"] = "acme"
    acme.collective_setup(context=context)
    with pytest.raises(
        UnsupportedError, match=f"collective acme does not implement collective_{hook}, and this job has 2 ranks"
    ):
        getattr(acme, f"collective_{hook}")(**CONTRACT_2[hook], group=None)
