"""The ring: collectives of any size, traffic, bit-identical results, and errors when a neighbour leaves."""

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
from plugframe_builtins.tensor_parallel.strategy import TensorParallel


def tensor_of_rank(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(rank)).to(dtype)


def on_three_ranks(world: World) -> dict[str, Any]:
    """Collect the results for all tests below, in a single start of the ranks."""
    results: dict[str, Any] = {}
    with Lite(accelerator="cpu", devices=3, strategy="ddp", collective="ring") as lite:
        lite.launch()
        group = dist.group.WORLD
        assert isinstance(group, RingGroup)
        results["backend"] = dist.get_backend()
        for count in (1, 2, 3, 1000, 300_001):
            tensor = tensor_of_rank(lite.global_rank, count, torch.float32)
            before = group.ring.sent_bytes
            dist.all_reduce(tensor)
            results[f"sum {count}"] = tensor
            results[f"bytes {count}"] = group.ring.sent_bytes - before
        for source in range(3):
            tensor = tensor_of_rank(lite.global_rank, 700_000, torch.float32)
            dist.broadcast(tensor, source)
            results[f"from {source}"] = torch.equal(tensor, tensor_of_rank(source, 700_000, torch.float32))
        pair = dist.new_group([0, 2])
        if lite.global_rank != 1:
            tensor = torch.tensor([float(lite.global_rank + 1)])
            dist.all_reduce(tensor, group=pair)
            results["pair"] = tensor.item()
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        x = tensor_of_rank(lite.global_rank, 8, torch.float32).view(2, 4)
        lite.backward(model(x).square().mean())
        optimizer.step()
        results["weight"] = model.weight.detach().clone()
        try:
            dist.all_reduce(torch.ones(1), dist.ReduceOp.BXOR)
        except ValueError as error:
            results["refused"] = str(error)
    results["left"] = dist.is_initialized()
    results["sharded"] = sharded_and_split(world)
    return results


def sharded_and_split(world: World) -> dict[str, torch.Tensor]:
    """Return the weights after a step of layers that are split over the ranks of a mesh, sharded by ``fsdp``."""
    plan = TensorParallel(plan={"0": "colwise", "1": "rowwise"})
    strategy, mesh = ["fsdp", plan], {"data": 1, "tensor": 3}
    with Lite(accelerator="cpu", devices=3, strategy=strategy, mesh=mesh, collective="ring") as lite:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lite.setup(model, optimizer)
        lite.backward(model(tensor_of_rank(0, 8, torch.float32).view(2, 4)).square().mean())
        optimizer.step()
        return lite.state_dict(model, all_ranks=True)


def alone_in_the_ring(world: World) -> str:
    """Let rank 1 leave; return the error of rank 0."""
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
def results() -> list[dict[str, Any]]:
    """The results of the three ranks."""
    return run_ranks(3, on_three_ranks)


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 300_001])
def test_all_ranks_get_the_same_sum(results: list[dict[str, Any]], count: int) -> None:
    """Sums are bit-identical, also with fewer elements than ranks."""
    expected = sum(tensor_of_rank(rank, count, torch.float32) for rank in range(3))
    torch.testing.assert_close(results[0][f"sum {count}"], expected)
    assert all(torch.equal(each[f"sum {count}"], results[0][f"sum {count}"]) for each in results)


def test_a_rank_sends_little_more_than_the_tensor(results: list[dict[str, Any]]) -> None:
    """A rank sends 2 (n - 1) / n of the tensor, not n - 1 times the tensor."""
    for each in results:
        assert each["bytes 300001"] == pytest.approx(2 * 2 / 3 * 4 * 300_001, rel=1e-4)


def test_any_rank_can_broadcast(results: list[dict[str, Any]]) -> None:
    """A broadcast in several chunks works from every source."""
    assert all(each[f"from {source}"] for each in results for source in range(3))


def test_groups_are_rings_of_their_own(results: list[dict[str, Any]]) -> None:
    """A subgroup of two of three ranks reduces among its members."""
    assert [each.get("pair") for each in results] == [4.0, None, 4.0]


def test_ddp_runs_over_it(results: list[dict[str, Any]]) -> None:
    """Gradients under ddp equal those of one process on the full batch."""
    assert {each["backend"] for each in results} == {"ring"}
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    batch = torch.cat([tensor_of_rank(rank, 8, torch.float32).view(2, 4) for rank in range(3)])
    model(batch).square().mean().backward()
    assert model.weight.grad is not None
    for each in results:
        torch.testing.assert_close(each["weight"], model.weight.detach() - 0.1 * model.weight.grad)


def test_a_mesh_runs_over_it(results: list[dict[str, Any]]) -> None:
    """A layer that is split and sharded over the ring is trained as in one process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model(tensor_of_rank(0, 8, torch.float32).view(2, 4)).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for each in results:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(each["sharded"][name], value)


def test_an_unsupported_reduction_raises(results: list[dict[str, Any]]) -> None:
    """An unsupported reduction raises; tear-down destroys the group."""
    assert all("supports the reductions SUM, AVG, PRODUCT, MIN, MAX, not" in each["refused"] for each in results)
    assert not any(each["left"] for each in results)


def test_a_neighbour_that_leaves_is_an_error() -> None:
    """The error is raised immediately, not after the timeout of half an hour."""
    errors = run_ranks(2, alone_in_the_ring)
    assert errors[0] == "The barrier 'the end' failed on rank 0: A neighbour of rank 0 has left the ring."


def test_a_connection_without_the_token_is_rejected() -> None:
    """A process that connects without the token from the store is not accepted as a neighbour."""
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
    """The error states the allowed values."""
    with pytest.raises(SettingError, match="timeout_s=0 must be a number of seconds above 0"):
        RingCollective(timeout_s=0)
