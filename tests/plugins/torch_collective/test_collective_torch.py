"""The torch collective on real gloo ranks, and the single one beside it."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from plugframe.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    EnvironmentMismatchError,
    OrderError,
    PlugframeWarning,
    SettingError,
    UnsupportedError,
)
from plugframe.hooks import Plugin
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins import single, torch_collective
from plugframe_builtins._shared.torch_collective import compat
from plugframe_builtins._shared.torch_collective.connection import wait_for_ranks
from plugframe_builtins.single.one_rank import OneRank
from plugframe_builtins.torch_collective.collective import TorchCollective
from ranks import hooks_of, rank_store, run_checks

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)


def context_of(world: World, **hooks: Any) -> Context:
    """Return a context on the CPU whose environment is the store of the test's ranks."""
    hooks.setdefault("environment_store", lambda context, timeout_s: rank_store(timeout_s))
    hooks.setdefault("accelerator_collective_backend", lambda: "gloo")
    return Context(world=world, device=torch.device("cpu"), hooks=SimpleNamespace(**hooks), names={}, timeout_s=20.0)


@contextmanager
def ranks_with_collective(world: World) -> Iterator[Any]:
    """Yield the hooks of a torch collective that is set up, and the world."""
    collective = TorchCollective()
    collective.collective_setup(context=context_of(world))
    try:
        yield hooks_of(collective, world=world, plugin=collective)
    finally:
        collective.collective_teardown()


def both(c: Any, make: Callable[[int], Tensor]) -> list[Tensor]:
    """Return what every rank made."""
    return [make(rank) for rank in range(c.world.world_size)]


#: So many of a small tensor no longer go along with what the ranks agree on, but take an exchange of their own.
MANY = 300


def same(result: Tensor, large: Tensor) -> Tensor:
    """Return the result of a small tensor, which that of many of it has to repeat."""
    for row in (large[0], large[-1]):
        assert (row.dtype, row.shape) == (result.dtype, result.shape)
        assert torch.equal(row.contiguous().view(-1).view(torch.uint8), result.contiguous().view(-1).view(torch.uint8))
    return result


def many(tensor: Tensor) -> Tensor:
    return tensor.detach().unsqueeze(0).expand(MANY, *tensor.shape)


def gathered(c: Any, tensor: Tensor, **kwargs: Any) -> Tensor:
    kwargs = {"group": None, "sync_grads": False, **kwargs}
    result: Tensor = c.collective_all_gather(tensor=tensor, **kwargs)
    if tensor.layout is torch.strided and tensor.numel():
        large = c.collective_all_gather(tensor=many(tensor), **{**kwargs, "sync_grads": False})
        same(result.detach(), large.transpose(0, 1))
    return result


def reduced(c: Any, tensor: Tensor, op: str, group: Any = None) -> Tensor:
    result = c.collective_all_reduce(tensor=tensor, op=op, group=group)
    if tensor.numel():
        same(result, c.collective_all_reduce(tensor=many(tensor), op=op, group=group))
    return result


def gather_stacks_in_every_dtype(c: Any) -> None:
    """all_gather gives (ranks, *shape) in rank order, whatever the dtype."""
    for dtype in DTYPES:
        values = both(c, lambda rank: torch.tensor([[0, 1, rank], [rank, 1, 0]]).to(dtype))  # noqa: B023
        result = gathered(c, values[c.world.global_rank])
        assert result.dtype is dtype
        assert result.shape == (2, 2, 3)
        assert torch.equal(result.view(torch.uint8), torch.stack(values).view(torch.uint8))


def shapes_follow_one_law(c: Any) -> None:
    """0-d, empty, transposed and strided inputs keep their shape; results are new and contiguous."""
    base = torch.arange(12.0).view(3, 4)
    for tensor in (
        torch.tensor(1.5),
        torch.empty(0),
        torch.empty(2, 0, 3),
        base.t(),
        base[:, ::2],
        base[0].expand(2, 4),
    ):
        before = tensor.clone()
        for result in (gathered(c, tensor)[0], reduced(c, tensor, "mean"), broadcast(c, tensor)):
            assert result.shape == tensor.shape
            assert result.is_contiguous()
            assert torch.equal(result, tensor)
        summed = reduced(c, tensor, "sum")
        summed.add_(1.0)
        assert torch.equal(tensor, before)


def broadcast(c: Any, tensor: Tensor, src: int = 0) -> Tensor:
    result = c.collective_broadcast(tensor=tensor, src=src, group=None)
    return same(result, c.collective_broadcast(tensor=many(tensor), src=src, group=None)) if tensor.numel() else result


def reductions_compute_their_names(c: Any) -> None:
    """sum, mean, avg, min, max and product are what they say, and keep the dtype."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8):
        values = torch.stack(both(c, lambda rank: torch.tensor([2, 3 + rank]))).to(dtype)
        mine = values[c.world.global_rank]
        want = {"sum": values.sum(0), "min": values.amin(0), "max": values.amax(0), "product": values.prod(0)}
        if dtype.is_floating_point:
            want["mean"] = want["avg"] = values.mean(0)
        for op, expected in want.items():
            result = reduced(c, mine, op)
            assert result.dtype is dtype
            assert torch.equal(result, expected.to(dtype)), (dtype, op)
            rows = torch.stack([mine, mine])
            row = c.collective_reduce_scatter(tensor=rows, op=op, group=None)
            assert row.dtype is dtype
            assert torch.equal(row, expected.to(dtype)), (dtype, op)


def bools_stay_bools(c: Any) -> None:
    """Reductions of bools are 'any' (sum, max) and 'all' (product, min); the result holds 0 or 1."""
    mine = torch.tensor([True, c.world.global_rank == 0, False])
    for op, expected in {"sum": [1, 1, 0], "max": [1, 1, 0], "product": [1, 0, 0], "min": [1, 0, 0]}.items():
        result = reduced(c, mine, op)
        assert result.view(torch.uint8).tolist() == expected
        assert result.dtype is torch.bool


def mean_of_halves_neither_overflows_nor_rounds_the_sum(c: Any) -> None:
    """The mean of float16 60000 is 60000, though the sum is infinite."""
    assert reduced(c, torch.tensor([60000.0], dtype=torch.float16), "mean").item() == 60000.0
    c8 = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    assert reduced(c, c8, "sum").float().tolist() == [2.0, 4.0]


def complex_numbers_are_summed_and_averaged(c: Any) -> None:
    """Complex sum and mean work, conjugate views too; an order of complex numbers is refused."""
    mine = torch.tensor([1 + 2j, 3j * c.world.global_rank])
    assert torch.equal(reduced(c, mine, "sum"), torch.tensor([2 + 4j, 3j]))
    assert torch.equal(reduced(c, mine.conj(), "mean"), torch.tensor([1 - 2j, -1.5j]))
    assert torch.equal(gathered(c, mine.conj())[1], torch.tensor([1 - 2j, -3j]))
    rows = torch.stack([mine, mine])
    assert torch.equal(c.collective_reduce_scatter(tensor=rows, op="sum", group=None), torch.tensor([2 + 4j, 3j]))
    with pytest.raises(SettingError, match=r"'max' of a torch.complex64 tensor is not defined: use 'sum' or 'mean'"):
        reduced(c, mine, "max")


def reduce_scatter_gives_this_ranks_row(c: Any) -> None:
    """Rank r gets row r of the reduction; a first dimension that is not the number of ranks is refused."""
    rows = torch.arange(8.0).view(2, 2, 2) + c.world.global_rank
    expected = (2 * torch.arange(8.0).view(2, 2, 2) + 1)[c.world.global_rank]
    assert torch.equal(c.collective_reduce_scatter(tensor=rows, op="sum", group=None), expected)
    with pytest.raises(SettingError, match=r"over 2 ranks takes shape \(2, …\), got \(3,\)"):
        c.collective_reduce_scatter(tensor=torch.ones(3), op="sum", group=None)


def unequal_tensors_are_an_error_on_every_rank(c: Any) -> None:
    """Unequal shapes, dtypes, ranks of tensor or calls raise the same error on all ranks, and nothing hangs."""
    rank = c.world.global_rank
    shapes = torch.ones(2 + rank)
    dtypes = torch.ones(2, dtype=(torch.float32, torch.float64)[rank])
    dims = torch.ones((2, 3) if rank else (6,))
    many = torch.ones([1] * 63 + [2 + rank])
    for tensor in (shapes, dtypes, dims, many):
        for call in (gathered, broadcast, lambda c, tensor: reduced(c, tensor, "sum")):
            with pytest.raises(CollectiveMismatchError, match=r"rank 0: .* rank 1: ") as error:
                call(c, tensor)
    expected = r"rank 0: all_gather of \(2,\) float32 on cpu; rank 1: all_gather of \(3,\) float32 on cpu"
    with pytest.raises(CollectiveMismatchError, match=expected):
        gathered(c, shapes)
    with pytest.raises(CollectiveMismatchError, match=r"rank 0: all_reduce\(sum\) .*; rank 1: all_gather"):
        gathered(c, torch.ones(1)) if rank else reduced(c, torch.ones(1), "sum")
    with pytest.raises(CollectiveMismatchError, match=r"broadcast\(src=0\) .*; rank 1: broadcast\(src=1\)"):
        broadcast(c, torch.ones(1), src=rank)
    with pytest.raises(CollectiveMismatchError, match=r"reduce_scatter\(sum\) of \(2,\)"):
        c.collective_reduce_scatter(tensor=torch.ones(2 + rank), op="sum", group=None)
    assert "\n" not in str(error.value)
    assert gathered(c, torch.tensor(rank)).tolist() == [0, 1]


def a_wrong_reduction_is_refused_on_every_rank(c: Any) -> None:
    """An unknown reduction and a mean of whole numbers name what to use instead."""
    with pytest.raises(SettingError, match="'average' is not a reduction: use one of 'sum', 'mean'"):
        reduced(c, torch.ones(1), "average")
    with pytest.raises(SettingError, match=r"'mean' of a tensor of torch.int64 .* use reduce_op='sum'"):
        reduced(c, torch.ones(1, dtype=torch.int64), "mean")
    with pytest.raises(SettingError, match=r"takes dense tensors, got torch.sparse_coo: use tensor.to_dense\(\)"):
        gathered(c, torch.eye(2).to_sparse())


def gradients_flow_back_to_every_input(c: Any) -> None:
    """With sync_grads each input gets the sum over ranks of the gradients of its row, twice if asked."""
    rank = c.world.global_rank
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    weights = torch.tensor([[1.0, 10.0], [100.0, 1000.0]]) * (rank + 1)
    (gathered(c, x, sync_grads=True) * weights).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == ([3.0, 30.0] if rank == 0 else [300.0, 3000.0])
    (grad,) = torch.autograd.grad(gathered(c, x, sync_grads=True).pow(3).sum(), x, create_graph=True)
    assert torch.equal(grad, 2 * 3 * x.detach() ** 2)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.equal(second, 2 * 6 * x.detach())
    assert not gathered(c, x).requires_grad
    whole = gathered(c, torch.arange(3), sync_grads=True)
    assert whole.tolist() == [[0, 1, 2]] * 2


def broadcast_gives_the_source_ranks_tensor(c: Any) -> None:
    """Every rank gets rank src's tensor, in any dtype, and inputs stay what they were."""
    for dtype in DTYPES:
        mine = torch.tensor([[1, c.world.global_rank]]).to(dtype)
        before = mine.clone()
        result = broadcast(c, mine, src=1)
        assert torch.equal(result.view(torch.uint8), torch.tensor([[1, 1]]).to(dtype).view(torch.uint8))
        assert torch.equal(mine.view(torch.uint8), before.view(torch.uint8))
    with pytest.raises(SettingError, match="src=2 is not in this group, which has the ranks 0, 1"):
        broadcast(c, torch.ones(1), src=2)


def objects_travel(c: Any) -> None:
    """Any picklable object is gathered in rank order and broadcast from its source."""
    mine = {"rank": c.world.global_rank, "text": "x" * (1 + 1000 * c.world.global_rank)}
    everyone = c.collective_all_gather_object(obj=mine, group=None)
    assert [item["rank"] for item in everyone] == [0, 1]
    assert len(everyone[1]["text"]) == 1001
    assert c.collective_broadcast_object(obj=mine, src=1, group=None)["rank"] == 1


def what_cannot_be_sent_is_told_on_all_ranks(c: Any) -> None:
    """An object that cannot be pickled is its rank's own error, and one of the others that names the rank."""
    rank = c.world.global_rank
    obj = (lambda: None) if rank == 1 else "x" * 1000
    said = "(pickle|local object)"  # Python's words, which change
    said = (
        f"This object cannot be sent to other ranks: .*{said}"
        if rank == 1
        else f"Rank 1 could not send its object: .*{said}"
    )
    with pytest.raises(CollectiveMismatchError, match=said) as caught:
        c.collective_all_gather_object(obj=obj, group=None)
    if rank == 1:
        assert isinstance(caught.value.__cause__, (AttributeError, pickle.PicklingError))
    with pytest.raises(CollectiveMismatchError, match=said):
        c.collective_broadcast_object(obj=obj, src=1, group=None)
    assert c.collective_broadcast_object(obj=obj, src=0, group=None) == "x" * 1000


def a_gather_with_gradients_is_another_call(c: Any) -> None:
    """One rank that wants gradients back and one that does not is an error, not a hang in backward."""
    with pytest.raises(CollectiveMismatchError, match="all_gather with gradients of"):
        c.collective_all_gather(tensor=torch.ones(2), group=None, sync_grads=c.world.global_rank == 0)
    sparse = torch.eye(2).to_sparse() if c.world.global_rank == 0 else torch.eye(2)
    with pytest.raises(CollectiveMismatchError, match="float32 sparse_coo on cpu"):
        c.collective_all_reduce(tensor=sparse, op="sum", group=None)


def groups_hold_their_members_alone(c: Any) -> None:
    """A group has its own size and global source ranks; a rank outside it is told so instead of hanging."""
    rank = c.world.global_rank
    groups = [c.collective_new_group(ranks=[r]) for r in range(2)]
    pair = c.collective_new_group(ranks=range(2))
    mine = torch.tensor([float(rank)])
    assert gathered(c, mine, group=groups[rank]).tolist() == [[rank]]
    assert reduced(c, mine, "sum", group=groups[rank]).tolist() == [rank]
    assert reduced(c, mine, "sum", group=pair).tolist() == [1.0]
    assert c.collective_broadcast(tensor=mine, src=rank, group=groups[rank]).tolist() == [rank]
    assert c.collective_all_gather_object(obj=rank, group=groups[rank]) == [rank]
    with pytest.raises(SettingError, match=f"Rank {rank} is not in this group"):
        gathered(c, mine, group=groups[1 - rank])
    with pytest.raises(SettingError, match=f"src={1 - rank} is not in this group"):
        c.collective_broadcast(tensor=mine, src=1 - rank, group=groups[rank])
    c.collective_barrier(name="pair", group=pair)


def a_monitored_barrier_names_who_is_missing(c: Any) -> None:
    """The error names the missing rank on every waiting rank, rank 0 included; the connections stay usable."""
    for _ in range(3):
        c.collective_monitored_barrier(name="all", timeout_s=20.0)
    for absent in (1, 0):
        if c.world.global_rank != absent:
            pattern = f"The barrier 'saving' waited 0.05 s on rank {1 - absent}: missing rank {absent}"
            with pytest.raises(RuntimeError, match=pattern):
                c.collective_monitored_barrier(name="saving", timeout_s=0.05)
        c.collective_barrier(name="after", group=None)
        if c.world.global_rank == absent:
            c.collective_monitored_barrier(name="saving", timeout_s=0.05)
    c.collective_monitored_barrier(name="all", timeout_s=20.0)


def nothing_listens_beyond_loopback(c: Any) -> None:
    """On one node every socket this process listens on is bound to loopback, also for groups made later."""
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    c.collective_new_group(ranks=[0, 1])
    listening = listening_addresses()
    assert listening
    assert not [address for address in listening if not address.startswith(("127.", "::1"))]


def listening_addresses() -> list[str]:
    """Return the addresses this process listens on, read from /proc."""
    import socket
    import struct

    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself, or one that another thread closed
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    mine = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    addresses = []
    for table, family in (("/proc/net/tcp", socket.AF_INET), ("/proc/net/tcp6", socket.AF_INET6)):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in mine:
                raw = bytes.fromhex(fields[1].partition(":")[0])
                words = struct.unpack(f">{len(raw) // 4}I", raw)
                addresses.append(socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words)))
    return addresses


def the_process_group_is_torchs(c: Any) -> None:
    """collective_process_group gives torch's default group."""
    assert c.collective_process_group() is dist.group.WORLD


CHECKS = [
    gather_stacks_in_every_dtype,
    shapes_follow_one_law,
    reductions_compute_their_names,
    bools_stay_bools,
    mean_of_halves_neither_overflows_nor_rounds_the_sum,
    complex_numbers_are_summed_and_averaged,
    reduce_scatter_gives_this_ranks_row,
    unequal_tensors_are_an_error_on_every_rank,
    a_wrong_reduction_is_refused_on_every_rank,
    gradients_flow_back_to_every_input,
    broadcast_gives_the_source_ranks_tensor,
    objects_travel,
    what_cannot_be_sent_is_told_on_all_ranks,
    a_gather_with_gradients_is_another_call,
    groups_hold_their_members_alone,
    a_monitored_barrier_names_who_is_missing,
    the_process_group_is_torchs,
    *([nothing_listens_beyond_loopback] if sys.platform == "linux" else []),
]


@pytest.fixture(scope="module")
def on_two_ranks() -> dict[str, str]:
    """Run every check on two ranks of one job."""
    return run_checks(2, ranks_with_collective, CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_ranks(check: Callable[[Any], None], on_two_ranks: dict[str, str]) -> None:
    """The rule in the check's docstring holds on both of two gloo ranks."""
    assert not on_two_ranks[check.__name__], on_two_ranks[check.__name__]


@contextmanager
def ranks_alone(world: World) -> Iterator[World]:
    """Yield the world, with no process group."""
    yield world


def nothing_is_left_behind(world: World) -> None:
    """Tear-down destroys the group and restores the environment and excepthook; ranks can connect again."""
    before = dict(os.environ), sys.excepthook
    for turn in range(3):
        collective = TorchCollective()
        collective.collective_setup(context=context_of(world))
        total = collective.collective_all_reduce(tensor=torch.tensor(turn), op="sum", group=None)
        assert total.item() == 2 * turn
        collective.collective_teardown()
        collective.collective_teardown()
        assert not dist.is_initialized()
        assert collective.collective_process_group() is None
        assert (dict(os.environ), sys.excepthook) == before


def a_forked_child_leaves_groups_of_its_parent_alone(world: World) -> None:
    """A group that only a cycle keeps is not destroyed in a forked child, where its threads are not."""
    collective = TorchCollective()
    collective.collective_setup(context=context_of(world))
    cycle: list[Any] = [dist.new_group()]
    cycle.append(cycle)
    dist.destroy_process_group(cycle[0])
    collective.collective_teardown()
    gc.disable()
    del cycle
    child = multiprocessing.get_context("fork").Process(target=gc.collect, daemon=True)
    child.start()
    child.join(30.0)
    code = child.exitcode
    child.kill()
    child.join()
    gc.enable()
    assert code == 0, "the child waits for threads that it does not have"


def a_failed_set_up_leaves_nothing_either(world: World) -> None:
    """If the ranks cannot meet, environment and excepthook are what they were."""
    before = dict(os.environ), sys.excepthook

    def no_store(context: Context, timeout_s: float) -> Any:
        raise RuntimeError("nobody there")

    collective = TorchCollective()
    with pytest.raises(RuntimeError, match="nobody there"):
        collective.collective_setup(context=context_of(world, environment_store=no_store))
    collective.collective_teardown()
    assert (dict(os.environ), sys.excepthook) == before


def interfaces_chosen_by_the_user_or_for_many_nodes_stay(world: World) -> None:
    """A GLOO_SOCKET_IFNAME of the user's is kept; nothing is chosen for a job on several nodes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    connected = TorchCollective()
    connected.collective_setup(context=context_of(world))
    connected.collective_teardown()
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "lo"
    seen = []

    def look(context: Context, timeout_s: float) -> Any:
        seen.append(os.environ.get("GLOO_SOCKET_IFNAME"))
        return rank_store(timeout_s)

    for num_nodes in (1, 2):
        fields = {**vars(world), "num_nodes": num_nodes}
        connected.collective_setup(context=context_of(World(**fields), environment_store=look))
        connected.collective_teardown()
    assert seen == ["lo", None]


def a_users_process_group_is_used_and_left_alone(world: World) -> None:
    """A group that exists is used as it is, with a warning for settings without effect, and stays."""
    dist.init_process_group("gloo")
    collective = TorchCollective(backend="gloo")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        collective.collective_setup(context=context_of(world))
    expected = ["backend='gloo' and timeout_s=20.0 of the torch collective have no effect"]
    texts = [str(item.message) for item in caught if item.category is PlugframeWarning]
    assert [text[: len(expected[0])] for text in texts] == (expected if world.global_rank == 0 else [])
    assert collective.collective_all_reduce(tensor=torch.tensor(1), op="sum", group=None).item() == 2
    collective.collective_monitored_barrier(name="mine", timeout_s=20.0)
    collective.collective_teardown()
    assert dist.is_initialized()
    other = World(global_rank=world.global_rank, world_size=4)
    expected_error = rf"initialised as rank {world.global_rank} of 2, but this process is rank {world.global_rank} of 4"
    with pytest.raises(EnvironmentMismatchError, match=expected_error):
        collective.collective_setup(context=context_of(other))
    dist.destroy_process_group()


def an_absent_rank_is_an_error_after_the_time_allowed(world: World) -> None:
    """timeout_s bounds every exchange; a barrier's error names the barrier."""
    context = context_of(world)
    collective = TorchCollective(timeout_s=0.3)
    patient = Context(**{**vars(context), "timeout_s": None})
    collective.collective_setup(context=patient)
    if world.global_rank == 0:
        with pytest.raises(RuntimeError, match="The barrier 'late' failed on rank 0"):
            collective.collective_barrier(name="late", group=None)
    else:
        key = "absent/done"
        store = rank_store()
        store.wait([key])
    if world.global_rank == 0:
        rank_store().set("absent/done", "1")
    collective.collective_teardown()
    with pytest.raises(SettingError, match=r"timeout_s=0.3 .* contradicts --timeout 20: give one of them"):
        collective.collective_setup(context=context)


SETUP_CHECKS = [
    nothing_is_left_behind,
    a_forked_child_leaves_groups_of_its_parent_alone,
    a_failed_set_up_leaves_nothing_either,
    interfaces_chosen_by_the_user_or_for_many_nodes_stay,
    a_users_process_group_is_used_and_left_alone,
    an_absent_rank_is_an_error_after_the_time_allowed,
]


@pytest.fixture(scope="module")
def set_up_on_two_ranks() -> dict[str, str]:
    """Run every check of set-up and tear-down on two ranks of one job."""
    return run_checks(2, ranks_alone, SETUP_CHECKS)


@pytest.mark.parametrize("check", SETUP_CHECKS, ids=lambda check: check.__name__)
def test_set_up(check: Callable[[Any], None], set_up_on_two_ranks: dict[str, str]) -> None:
    """The rule in the check's docstring holds on both of two gloo ranks."""
    assert not set_up_on_two_ranks[check.__name__], set_up_on_two_ranks[check.__name__]


def test_an_unknown_backend_is_refused_with_the_closest_match() -> None:
    """A backend torch does not know is an error that lists those it knows."""
    with pytest.raises(SettingError, match=r"backend='glo' is not known .*'gloo'.* Did you mean 'gloo'\?"):
        TorchCollective(backend="glo").collective_setup(context=context_of(World()))


@pytest.mark.skipif(dist.is_nccl_available(), reason="this torch has NCCL")
def test_a_backend_torch_was_built_without_is_refused() -> None:
    """A backend this build lacks is an error before any rank is waited for."""
    with pytest.raises(UnsupportedError, match="backend='cpu:gloo,cuda:nccl' needs 'nccl', which this build of torch"):
        TorchCollective(backend="cpu:gloo,cuda:nccl").collective_setup(context=context_of(World()))


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan")])
def test_a_timeout_must_be_a_time(timeout_s: float) -> None:
    """timeout_s must be above 0."""
    with pytest.raises(SettingError, match="it is a number above 0"):
        TorchCollective(timeout_s=timeout_s)


def test_older_torch_is_reached_by_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch lacks the names of 2.13, the shim stands for the ones it had."""
    for name in ("all_gather_single", "reduce_scatter_single"):
        monkeypatch.delattr(dist, name, raising=False)
    names = runpy.run_path(str(compat.__file__))
    assert names["all_gather_single"] is dist.all_gather_into_tensor
    assert names["reduce_scatter_single"] is dist.reduce_scatter_tensor


def test_a_collective_that_is_not_set_up_says_so() -> None:
    """A call before set-up is an OrderError, and tear-down without set-up does nothing."""
    collective = TorchCollective()
    collective.collective_teardown()
    with pytest.raises(OrderError, match=r"not set up: call lite.launch\(\) first"):
        collective.collective_barrier(name="early", group=None)


def test_descriptors_say_where_they_work() -> None:
    """One rank picks the single collective, several the torch one, which has a process group."""
    assert isinstance(single.collective, Plugin)
    assert (single.collective.ranks, single.collective.priority) == ("one", 100)
    assert (torch_collective.plugin.ranks, torch_collective.plugin.priority) == ("any", 10)
    assert torch_collective.plugin.provides == ("process-group",)


def test_the_single_collective_refuses_more_than_one_rank() -> None:
    """Two ranks under collective='single' would each compute alone: it is refused."""
    with pytest.raises(UnsupportedError, match="connects no ranks, and this job has 2: use collective='torch'"):
        OneRank().collective_setup(context=context_of(World(world_size=2)))


def test_the_single_collective_has_the_shapes_of_many_ranks() -> None:
    """all_gather adds the dimension of the ranks, reduce_scatter takes it away, on one rank too."""
    collective = OneRank()
    collective.collective_setup(context=context_of(World()))
    tensor = torch.ones(2, 3)
    assert gathered(hooks_of(collective), tensor).shape == (1, 2, 3)
    assert reduced(hooks_of(collective), tensor, "mean").shape == (2, 3)
    row = collective.collective_reduce_scatter(tensor=tensor.unsqueeze(0), op="sum", group=None)
    assert row.shape == (2, 3)


def test_ranks_that_do_not_start_are_named() -> None:
    """Connecting waits longer than a collective may take, and names the ranks that never came."""
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(seconds=1))
    with pytest.raises(CollectiveTimeoutError, match=r"Of 3 ranks, ranks 1 and 2 did not connect within 0.1 s"):
        wait_for_ranks(store, World(global_rank=0, world_size=3, local_world_size=3), 0.1)
