"""The average on one rank, under ddp and under fsdp, and through a checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plugframe import CheckpointMismatchError, Lite, OrderError, PlugframeWarning
from plugframe.hooks.world import World
from plugframe.testing import run_ranks
from plugframe_builtins.ema.extension import EMA

DECAY = 0.9


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def batch(step: int, index: int, count: int) -> Tensor:
    full = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return full.chunk(count)[index]


def expected(num_steps: int) -> dict[str, Tensor]:
    """Return the averages of plain training in one process, with each update written out."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    averages = {name: value.clone() for name, value in net.state_dict().items()}
    for step in range(num_steps):
        optimizer.zero_grad()
        net(batch(step, 0, 1)).square().mean().backward()
        optimizer.step()
        for name, value in net.state_dict().items():
            averages[name] = DECAY * averages[name] + (1 - DECAY) * value
    return averages


def train(lite: Lite, net: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        lite.backward(net(batch(step, lite.global_rank, lite.world_size)).square().mean())
        optimizer.step()


def averages_of(lite: Lite, ema: EMA, net: Any) -> dict[str, Tensor]:
    with ema.averaged(net):
        return lite.state_dict(net, all_ranks=True)


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def job(ema: EMA, **settings: Any) -> Lite:
    return Lite(**{"accelerator": "cpu", "plugins": [ema], "devices": 1, **settings})


def test_it_averages_and_swaps() -> None:
    """Averages follow the formula; weights are as before after the block, gradients of training are untouched."""
    ema = EMA(decay=DECAY, warm_up=False)
    with job(ema) as lite:
        net = network()
        net, optimizer = lite.setup(net, torch.optim.SGD(net.parameters(), lr=0.5))
        train(lite, net, optimizer, range(5))
        before = {name: value.clone() for name, value in net.state_dict().items()}
        close(averages_of(lite, ema, net), expected(5))
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        with pytest.raises(OrderError, match="would train the averages"), ema.averaged(net):
            train(lite, net, optimizer, range(1))
        with pytest.raises(OrderError, match="takes a module that was set up"), ema.averaged(nn.Linear(1, 1)):
            pass


def test_options() -> None:
    """Updates are made every few steps, with a smaller decay at first, in float32 for bfloat16 weights."""
    ema = EMA(decay=0.99, every=2)
    with job(ema, precision="bf16-true") as lite:
        net = network()
        net, optimizer = lite.setup(net, torch.optim.SGD(net.parameters(), lr=0.5))
        (average,) = ema._averages
        start = average.tensors["0.weight"].clone()
        train(lite, net, optimizer, range(2))
        assert average.num_updates == 1
        assert start.dtype is torch.float32
        close({"w": average.tensors["0.weight"]}, {"w": start * 2 / 11 + net[0].weight.detach().float() * 9 / 11})


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    """The error of lite.load names the plugin, and nothing changes."""
    with job(EMA()) as lite:
        net = lite.setup(network())
        lite.save(tmp_path / "x", {"net": net})
    with job(EMA()) as lite:
        other = lite.setup(nn.Linear(2, 2))
        before = other.weight.detach().clone()
        with pytest.raises(CheckpointMismatchError, match="plugframe:ema: ValueError: names or shapes"):
            lite.load(tmp_path / "x", {})
        assert torch.equal(other.weight, before)
    with job(EMA()) as lite, pytest.raises(CheckpointMismatchError, match="averages of 1 modules, and 0 were set up"):
        lite.load(tmp_path / "x", {})


def on_ranks(world: World, path: str, steps: range, source: str, target: str, strategy: str) -> None:
    """Train for some steps from one checkpoint to the next; the averages are those of one process."""
    warnings.filterwarnings("ignore", ".* saved, .* load: each continues with the random numbers", PlugframeWarning)
    ema = EMA(decay=DECAY, warm_up=False)
    with job(ema, devices=world.world_size, strategy=strategy) as lite:
        net = network()
        net, optimizer = lite.setup(net, torch.optim.SGD(net.parameters(), lr=0.5))
        if source:
            lite.load(f"{path}/{source}", {"net": net, "optimizer": optimizer})
        train(lite, net, optimizer, steps)
        close(averages_of(lite, ema, net), expected(steps.stop))
        lite.save(f"{path}/{target}", {"net": net, "optimizer": optimizer})


def test_ranks_average_what_one_process_does(tmp_path: Path) -> None:
    """Under ddp and fsdp, resumed under the other one, and on another number of ranks."""
    run_ranks(2, on_ranks, str(tmp_path), range(3), "", "ddp", "ddp")
    run_ranks(2, on_ranks, str(tmp_path), range(3, 5), "ddp", "fsdp", "fsdp")
    run_ranks(4, on_ranks, str(tmp_path), range(5, 7), "fsdp", "wider", "fsdp")
    run_ranks(1, on_ranks, str(tmp_path), range(7, 9), "wider", "single", "auto")
