"""What the ring promises: collectives of any size, little traffic, equal bits, and an end when a neighbour leaves."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plugframe_ringgather.collective import RingCollective
from plugframe_ringgather.group import RingGroup
from torch import nn

from plugframe import Lite
from plugframe.errors import SettingError
from plugframe.hooks.world import World
from plugframe.testing import run_ranks


def of_rank(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(rank)).to(dtype)


def on_three_ranks(world: World) -> dict[str, Any]:
    """Everything that is asked below, in one start."""
    told: dict[str, Any] = {}
    with Lite(accelerator="cpu", devices=3, strategy="ddp", collective="ring") as lite:
        lite.launch()
        group = dist.group.WORLD
        assert isinstance(group, RingGroup)
        told["backend"] = dist.get_backend()
        for count in (1, 2, 3, 1000, 300_001):
            tensor = of_rank(lite.global_rank, count, torch.float32)
            before = group.ring.sent_bytes
            dist.all_reduce(tensor)
            told[f"sum {count}"] = tensor
            told[f"bytes {count}"] = group.ring.sent_bytes - before
        for source in range(3):
            tensor = of_rank(lite.global_rank, 700_000, torch.float32)
            dist.broadcast(tensor, source)
            told[f"from {source}"] = torch.equal(tensor, of_rank(source, 700_000, torch.float32))
        pair = dist.new_group([0, 2])
        if lite.global_rank != 1:
            tensor = torch.tensor([float(lite.global_rank + 1)])
            dist.all_reduce(tensor, group=pair)
            told["pair"] = tensor.item()
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        x = of_rank(lite.global_rank, 8, torch.float32).view(2, 4)
        lite.backward(model(x).square().mean())
        optimizer.step()
        told["weight"] = model.weight.detach().clone()
        try:
            dist.all_reduce(torch.ones(1), dist.ReduceOp.BXOR)
        except ValueError as error:
            told["refused"] = str(error)
    told["left"] = dist.is_initialized()
    return told


def alone_in_the_ring(world: World) -> str:
    """Rank 1 leaves; what does rank 0 say, and how soon?"""
    with Lite(accelerator="cpu", devices=2, collective="ring") as lite:
        lite.launch()
        lite.barrier()
        if lite.global_rank == 1:
            return "left"
        try:
            lite.barrier("the end")
        except RuntimeError as error:
            return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    """What each of three ranks saw."""
    return run_ranks(3, on_three_ranks)


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 300_001])
def test_all_ranks_get_the_same_sum(told: list[dict[str, Any]], count: int) -> None:
    """Also of fewer numbers than ranks; to the last bit."""
    expected = sum(of_rank(rank, count, torch.float32) for rank in range(3))
    torch.testing.assert_close(told[0][f"sum {count}"], expected)
    assert all(torch.equal(each[f"sum {count}"], told[0][f"sum {count}"]) for each in told)


def test_a_rank_sends_little_more_than_the_tensor(told: list[dict[str, Any]]) -> None:
    """Twice (n - 1) / n of it, and not n - 1 times."""
    for each in told:
        assert each["bytes 300001"] == pytest.approx(2 * 2 / 3 * 4 * 300_001, rel=1e-4)


def test_any_rank_can_tell_the_others(told: list[dict[str, Any]]) -> None:
    """A broadcast goes round from whichever rank it begins at, in several pieces."""
    assert all(each[f"from {source}"] for each in told for source in range(3))


def test_groups_are_rings_of_their_own(told: list[dict[str, Any]]) -> None:
    """Two of three ranks."""
    assert [each.get("pair") for each in told] == [4.0, None, 4.0]


def test_ddp_runs_over_it(told: list[dict[str, Any]]) -> None:
    """DistributedDataParallel's gradients travel the ring, and equal one process's on the whole batch."""
    assert {each["backend"] for each in told} == {"ring"}
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    batch = torch.cat([of_rank(rank, 8, torch.float32).view(2, 4) for rank in range(3)])
    model(batch).square().mean().backward()
    assert model.weight.grad is not None
    for each in told:
        torch.testing.assert_close(each["weight"], model.weight.detach() - 0.1 * model.weight.grad)


def test_what_it_cannot_do_is_said(told: list[dict[str, Any]]) -> None:
    """A reduction it does not know is refused; nothing is left of the group."""
    assert all("reduces by SUM, AVG, PRODUCT, MIN, MAX, not by" in each["refused"] for each in told)
    assert not any(each["left"] for each in told)


def test_a_neighbour_that_leaves_is_an_error() -> None:
    """At once, and not after the timeout of half an hour."""
    said = run_ranks(2, alone_in_the_ring)
    assert said[0] == "The barrier 'the end' failed on rank 0: A neighbour of rank 0 has left the ring."


def test_a_stranger_is_not_let_in() -> None:
    """Who connects without the word that was left in the store is not taken for a neighbour."""
    store = dist.HashStore()
    from threading import Thread

    from plugframe_ringgather.ring import Ring

    rings: dict[int, Ring] = {}

    def join(rank: int) -> None:
        rings[rank] = Ring(store, rank, 2, timeout_s=20, address="127.0.0.1")

    first = Thread(target=join, args=(0,))
    first.start()
    host, port, _ = store.get("ring/0").decode().split()
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"x" * 16)
        join(1)
        first.join()
    sent, came = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    rings[1].exchange(sent, None)
    rings[0].exchange(None, came)
    assert torch.equal(sent, came)
    for ring in rings.values():
        ring.close()


def test_a_wrong_timeout_is_refused() -> None:
    """In one line."""
    with pytest.raises(SettingError, match="timeout_s=0 must be a number of seconds above 0"):
        RingCollective(timeout_s=0)
