"""What local SGD and DiLoCo promise, on two real ranks."""

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
    """Counts what goes between the ranks."""

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


def by_hand(*, sync_every: int, lr: float, momentum: float) -> list[Tensor]:
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
    """Everything that is asked below, in one start."""
    told: dict[str, Any] = {}
    data = batches(world.global_rank)
    for name, strategy in (("local_sgd", LocalSGD(sync_every=4)), ("diloco", DiLoCo(sync_every=4))):
        exchanges = Exchanges()
        with Lite(accelerator="cpu", devices=2, strategy=strategy, plugins=[exchanges]) as lite:
            lite.launch()
            net = model()
            net, optimizer = lite.setup(net, torch.optim.AdamW(net.parameters(), lr=0.01))
            before = exchanges.count
            train(lite, net, optimizer, data[:3])
            told[f"{name} apart"] = parameters(net)
            told[f"{name} before"] = exchanges.count - before
            train(lite, net, optimizer, data[3:])
            told[f"{name} exchanges"] = exchanges.count - before
            told[name] = parameters(net)
    told["saved"] = resumed(data, f"{folder}/half", DiLoCo(sync_every=5))
    with Lite(accelerator="cpu", devices=2, strategy="local_sgd") as lite:
        lite.launch()
        net = model()
        net, optimizer = lite.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))
        train(lite, net, optimizer, data[:3])
        apart = parameters(net)
    told["torn down"] = apart, parameters(net)
    return told


def resumed(data: list[Tensor], path: str, strategy: Any) -> dict[str, Any]:
    """Train with a save in the middle of a round, and once more from what was saved."""
    told: dict[str, Any] = {}
    with Lite(accelerator="cpu", devices=2, strategy=strategy) as lite:
        lite.launch()
        net = model()
        net, optimizer = lite.setup(net, torch.optim.AdamW(net.parameters(), lr=0.01))
        train(lite, net, optimizer, data[:8])
        lite.save(path, {"model": net, "optimizer": optimizer})
        told["at the save"] = parameters(net)
        told["moments"] = [optimizer.state[p]["exp_avg"].clone() for p in net.parameters()]
        train(lite, net, optimizer, data[8:])
        told["uninterrupted"] = parameters(net)
    with Lite(accelerator="cpu", devices=2, strategy=DiLoCo(sync_every=5)) as lite:
        lite.launch()
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        net, optimizer = lite.setup(net, torch.optim.AdamW(net.parameters(), lr=0.01))
        lite.load(path, {"model": net, "optimizer": optimizer})
        train(lite, net, optimizer, data[8:])
        told["resumed"] = parameters(net)
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks save."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def told(folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    return run_ranks(2, on_two_ranks, str(folder))


@pytest.mark.parametrize(("name", "lr", "momentum"), [("local_sgd", 1.0, 0.0), ("diloco", 0.7, 0.9)])
def test_it_trains_as_the_papers_say(told: list[dict[str, Any]], name: str, lr: float, momentum: float) -> None:
    """Two ranks end where two workers in one process do, with torch's SGD as the outer optimizer."""
    torch.testing.assert_close(told[0][name], by_hand(sync_every=4, lr=lr, momentum=momentum))
    torch.testing.assert_close(told[0][name], told[1][name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["local_sgd", "diloco"])
def test_nothing_is_exchanged_within_a_round(told: list[dict[str, Any]], name: str) -> None:
    """Ranks part in a round; twelve steps are three rounds, and three exchanges."""
    assert all(not torch.equal(a, b) for a, b in zip(told[0][f"{name} apart"], told[1][f"{name} apart"], strict=True))
    assert [each[f"{name} before"] for each in told] == [0, 0]
    assert [each[f"{name} exchanges"] for each in told] == [3, 3]


def test_what_is_saved_is_the_same_on_all_ranks(told: list[dict[str, Any]]) -> None:
    """A save ends the round: parameters and the optimizer's moments are equal, and training goes on from them."""
    for what in ("at the save", "moments"):
        torch.testing.assert_close(told[0]["saved"][what], told[1]["saved"][what], rtol=0, atol=0)


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(told: list[dict[str, Any]]) -> None:
    """Bit for bit, the momentum of the outer optimizer included (law 4)."""
    for each in told:
        torch.testing.assert_close(each["saved"]["resumed"], each["saved"]["uninterrupted"], rtol=0, atol=0)


def test_tear_down_leaves_one_model(told: list[dict[str, Any]]) -> None:
    """The ranks' copies, apart in the middle of a round, are averaged at the end."""
    apart, ended = zip(*(each["torn down"] for each in told), strict=True)
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
    """In one line that says what is allowed."""
    with pytest.raises(SettingError, match=message):
        LocalSGD(**options)


def test_another_strategy_takes_what_was_saved(told: list[dict[str, Any]], folder: Path) -> None:
    """One process loads, without this plugin, what two ranks have saved: the keys are the user's own."""
    with Lite(accelerator="cpu", devices=1, strategy="single") as lite:
        net = model()
        net, optimizer = lite.setup(net, torch.optim.AdamW(net.parameters(), lr=0.01))
        with pytest.warns(PlugframeWarning, match="2 ranks saved, 1 load"):
            lite.load(folder / "half", {"model": net, "optimizer": optimizer})
        torch.testing.assert_close(parameters(net), told[0]["saved"]["at the save"], rtol=0, atol=0)
        train(lite, net, optimizer, batches(0)[8:])
