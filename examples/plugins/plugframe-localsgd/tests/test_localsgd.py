"""Local SGD and DiLoCo on two real ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from plugframe_localsgd.strategy import DiLoCo, LocalSGD
from torch import Tensor, nn

from plugframe import Lite, hookimpl
from plugframe.base import Extension
from plugframe.errors import PlugframeWarning, SettingError
from plugframe.hooks.world import World
from plugframe.testing import run_ranks

BATCHES = 12


class Exchanges(Extension):
    """Count reductions over ranks."""

    def __init__(self) -> None:
        self.count = 0

    @hookimpl(wrapper=True)
    def collective_all_reduce(self) -> Any:
        self.count += 1
        return (yield)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batches(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(5, 4, generator=generator) for _ in range(BATCHES)]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch.sum(1, keepdim=True)).square().mean()


def train(lite: Lite, net: nn.Module, optimizer: Any, data: list[Tensor]) -> None:
    for batch in data:
        optimizer.zero_grad()
        lite.backward(loss_of(net, batch))
        optimizer.step()


def parameters(net: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def reference(*, sync_every: int, lr: float, momentum: float) -> list[Tensor]:
    """Train two workers in one process, with torch's own SGD as the outer optimizer."""
    anchor = model()
    outer = torch.optim.SGD(anchor.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    workers = [copy.deepcopy(anchor) for _ in range(2)]
    inner = [torch.optim.AdamW(worker.parameters(), lr=0.01) for worker in workers]
    for step in range(BATCHES):
        for rank, worker in enumerate(workers):
            inner[rank].zero_grad()
            loss_of(worker, batches(rank)[step]).backward()
            inner[rank].step()
        if (step + 1) % sync_every == 0:
            for target, *each in zip(anchor.parameters(), *(w.parameters() for w in workers), strict=True):
                target.grad = target.detach() - torch.stack([p.detach() for p in each]).mean(0)
            outer.step()
            for worker in workers:
                worker.load_state_dict(anchor.state_dict())
    return parameters(anchor)


def on_two_ranks(world: World, folder: str) -> dict[str, Any]:
    """Collect the results for all tests below, in a single start of the ranks."""
    results: dict[str, Any] = {}
    data = batches(world.global_rank)
    for name, strategy in (("local_sgd", LocalSGD(sync_every=4)), ("diloco", DiLoCo(sync_every=4))):
        exchanges = Exchanges()
        with Lite(accelerator="cpu", devices=2, strategy=strategy, plugins=[exchanges]) as lite:
            lite.launch()
            net = model()
            net, optimizer = lite.setup(net, torch.optim.AdamW(net.parameters(), lr=0.01))
            before = exchanges.count
            train(lite, net, optimizer, data[:3])
            results[f"{name} apart"] = parameters(net)
            results[f"{name} before"] = exchanges.count - before
            train(lite, net, optimizer, data[3:])
            results[f"{name} exchanges"] = exchanges.count - before
            results[name] = parameters(net)
    results["saved"] = resumed(data, f"{folder}/half", DiLoCo(sync_every=5))
    with Lite(accelerator="cpu", devices=2, strategy="local_sgd") as lite:
        lite.launch()
        net = model()
        net, optimizer = lite.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))
        train(lite, net, optimizer, data[:3])
        apart = parameters(net)
    results["torn down"] = apart, parameters(net)
    return results


def resumed(data: list[Tensor], path: str, strategy: Any) -> dict[str, Any]:
    """Train with a save in the middle of a round, then resume from it."""
    results: dict[str, Any] = {}
    with Lite(accelerator="cpu", devices=2, strategy=strategy) as lite:
        lite.launch()
        net = model()
        net, optimizer = lite.setup(net, torch.optim.AdamW(net.parameters(), lr=0.01))
        train(lite, net, optimizer, data[:8])
        lite.save(path, {"model": net, "optimizer": optimizer})
        results["at the save"] = parameters(net)
        results["moments"] = [optimizer.state[p]["exp_avg"].clone() for p in net.parameters()]
        train(lite, net, optimizer, data[8:])
        results["uninterrupted"] = parameters(net)
    with Lite(accelerator="cpu", devices=2, strategy=DiLoCo(sync_every=5)) as lite:
        lite.launch()
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        net, optimizer = lite.setup(net, torch.optim.AdamW(net.parameters(), lr=0.01))
        lite.load(path, {"model": net, "optimizer": optimizer})
        train(lite, net, optimizer, data[8:])
        results["resumed"] = parameters(net)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the checkpoint."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """The results of both ranks."""
    return run_ranks(2, on_two_ranks, str(folder))


@pytest.mark.parametrize(("name", "lr", "momentum"), [("local_sgd", 1.0, 0.0), ("diloco", 0.7, 0.9)])
def test_it_matches_a_reference_implementation(
    results: list[dict[str, Any]], name: str, lr: float, momentum: float
) -> None:
    """Two ranks equal two workers in one process with torch's SGD as the outer optimizer."""
    torch.testing.assert_close(results[0][name], reference(sync_every=4, lr=lr, momentum=momentum))
    torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["local_sgd", "diloco"])
def test_nothing_is_exchanged_within_a_round(results: list[dict[str, Any]], name: str) -> None:
    """Ranks diverge within a round; twelve steps are three rounds and three collectives."""
    assert all(
        not torch.equal(a, b) for a, b in zip(results[0][f"{name} apart"], results[1][f"{name} apart"], strict=True)
    )
    assert [each[f"{name} before"] for each in results] == [0, 0]
    assert [each[f"{name} exchanges"] for each in results] == [3, 3]


def test_the_saved_state_is_the_same_on_all_ranks(results: list[dict[str, Any]]) -> None:
    """A save ends the round: parameters and moments are equal, and training continues with them."""
    for what in ("at the save", "moments"):
        torch.testing.assert_close(results[0]["saved"][what], results[1]["saved"][what], rtol=0, atol=0)


def test_a_resumed_run_equals_the_uninterrupted_one(results: list[dict[str, Any]]) -> None:
    """Bit for bit, outer momentum included (law 4)."""
    for each in results:
        torch.testing.assert_close(each["saved"]["resumed"], each["saved"]["uninterrupted"], rtol=0, atol=0)


def test_tear_down_leaves_one_model(results: list[dict[str, Any]]) -> None:
    """Tear-down in the middle of a round averages the copies."""
    apart, ended = zip(*(each["torn down"] for each in results), strict=True)
    torch.testing.assert_close(ended[0], ended[1], rtol=0, atol=0)
    torch.testing.assert_close(ended[0], [(a + b) / 2 for a, b in zip(*apart, strict=True)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_every": 0}, "sync_every=0 must be a number of optimizer steps, 1 or more"),
        ({"outer_lr": 0.0}, "outer_lr=0.0 must be a number above 0"),
        ({"outer_momentum": 1.0}, "outer_momentum=1.0 must be a number from 0 to below 1"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    """The error states the allowed values."""
    with pytest.raises(SettingError, match=message):
        LocalSGD(**options)


def test_another_strategy_loads_the_checkpoint(results: list[dict[str, Any]], folder: Path) -> None:
    """One process without this plugin loads the checkpoint of two ranks: the keys are the user's."""
    with Lite(accelerator="cpu", devices=1, strategy="single") as lite:
        net = model()
        net, optimizer = lite.setup(net, torch.optim.AdamW(net.parameters(), lr=0.01))
        with pytest.warns(PlugframeWarning, match="2 ranks saved, 1 load"):
            lite.load(folder / "half", {"model": net, "optimizer": optimizer})
        torch.testing.assert_close(parameters(net), results[0]["saved"]["at the save"], rtol=0, atol=0)
        train(lite, net, optimizer, batches(0)[8:])
