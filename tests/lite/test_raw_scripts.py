"""Left-overs of scripts for raw torch.distributed and torch.amp: kept and told, or refused, never doubled."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, DistributedSampler

from plugframe import EnvironmentMismatchError, Lite, OrderError, PlugframeWarning, SettingError, World
from plugframe.lite.raw_scripts import check_current_device
from ranks import run_ranks


def trained(precision: str, scaler: Any, autocast: torch.dtype | None = None, steps: int = 1) -> float:
    """Train for a step as a raw AMP script does, and return the weight's change."""
    with Lite(accelerator="cpu", devices=1, precision=precision) as lite:
        model = nn.Linear(1, 1, bias=False)
        before = model.weight.item()
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(torch.ones(1, 1)).sum()
        lite.backward(scaler.scale(loss) / steps if scaler is not None else loss)
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        return before - model.weight.item()


def test_an_own_grad_scaler_is_told_or_refused() -> None:
    """The script's GradScaler works where no precision scales, with a warning; beside one that does it is refused."""
    with pytest.warns(PlugframeWarning, match="GradScaler steps an optimizer .* pass precision='16-mixed'"):
        assert trained("32-true", torch.amp.GradScaler("cpu")) == pytest.approx(1)
    with pytest.raises(OrderError, match="and precision='16-mixed' scales it as well"):
        trained("16-mixed", torch.amp.GradScaler("cpu"))
    with pytest.raises(OrderError, match="and precision='16-mixed' scales it as well"):
        trained("16-mixed", torch.amp.GradScaler("cpu"), steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained("16-mixed", torch.amp.GradScaler("cpu", enabled=False))


def test_an_own_autocast_is_told_unless_it_is_the_precisions() -> None:
    """The script's autocast around a forward is reported once, with the precision to pass instead."""
    with pytest.warns(PlugframeWarning, match=r"bfloat16\), which applies to its forward .* 'bf16-mixed' for bfloat16"):
        trained("32-true", None, torch.bfloat16)
    with pytest.warns(PlugframeWarning, match=r"float16\), which does not apply to its forward, but"):
        trained("bf16-mixed", None, torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained("bf16-mixed", None, torch.bfloat16)


def test_ranks_that_the_job_does_not_know_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of init_process_group without their variables would each train by themselves."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(EnvironmentMismatchError, match=r"init_process_group\(\) for 2 ranks, and this job has one"):
        Lite(accelerator="cpu", devices=1).setup(nn.Linear(1, 1))


def test_another_current_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose current device was set to another one would make tensors there."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    check_current_device(SimpleNamespace(device=torch.device("cuda:0")))
    check_current_device(SimpleNamespace(device=torch.device("cpu")))
    with pytest.raises(OrderError, match=r"The current device is cuda:0, and this rank's is cuda:1: leave"):
        check_current_device(SimpleNamespace(device=torch.device("cuda:1")))


def test_a_module_that_is_sharded_already_is_refused() -> None:
    """A strategy shards a module: one that fully_shard() has seen before is refused."""
    module = nn.Sequential(nn.Linear(1, 1))
    module[0].__class__ = type("FSDPLinear", (FSDPModule, nn.Linear), {})
    with Lite(accelerator="cpu", devices=1) as lite, pytest.raises(SettingError, match=r"fully_shard\(\) already"):
        lite.setup(module)


def raw_script(world: World) -> list[float]:
    """Train as a script for raw DDP does, with a `Lite` put in."""
    dist.init_process_group("gloo")
    lite = Lite(accelerator="cpu", devices=2, strategy="ddp")
    lite.launch()
    data = torch.arange(8.0)[:, None]
    sampler = DistributedSampler(data, shuffle=False)
    loader = lite.setup_dataloaders(DataLoader(data, 2, sampler=sampler))
    model = nn.Linear(1, 1, bias=False)
    with pytest.raises(SettingError, match="wrapped in DistributedDataParallel already"):
        lite.setup(nn.parallel.DistributedDataParallel(nn.Linear(1, 1)))
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
    grads = []
    for epoch in range(1):
        sampler.set_epoch(epoch)
        for x in loader:
            optimizer.zero_grad()
            lite.backward(model(x).mean())
            grads.append(model.weight.grad.item())
            optimizer.step()
    dist.barrier()
    lite.teardown()
    dist.destroy_process_group()
    return grads


def test_a_raw_ddp_script_trains_right(capfd: pytest.CaptureFixture[str]) -> None:
    """A process group and a DistributedSampler of the script are used as they are: nothing is divided twice."""
    first, second = run_ranks(2, raw_script)
    assert first == second == [1.5, 5.5]
