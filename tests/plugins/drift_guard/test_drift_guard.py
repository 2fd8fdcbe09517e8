"""Models that should be one on all ranks, and are not."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from plugframe import Lite, OutOfSyncError, SettingError, UnsupportedError
from plugframe.diagnostics.replicas import check_replicated, named_tensors, tensor_hashes
from plugframe.hooks.world import World
from plugframe_builtins.drift_guard.extension import DriftGuard
from ranks import run_ranks


def net() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


def step(lite: Any, model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    lite.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()


def told(call: Any) -> str:
    try:
        call()
    except OutOfSyncError as error:
        return str(error)
    return ""


def drifting(world: World) -> dict[str, Any]:
    """Train in step, then let rank 1 go its own way; return what this rank was told."""
    found: dict[str, Any] = {}
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "timeout_s": 30.0}
    with Lite(plugins=DriftGuard(every=2), **settings) as lite:
        lite.launch()
        model, optimizer = lite.setup(*net())
        found["in step"] = [told(lambda: step(lite, model, optimizer)) for _ in range(4)]
        lite.assert_in_sync(model, optimizer)
        lite.assert_in_sync()
        weight = model[2].weight.data
        if world.global_rank == 1:
            weight[1, 2] += 1e-7
        found["asserted"] = told(lambda: lite.assert_in_sync(model, optimizer))
        found["guarded"] = [told(lambda: step(lite, model, optimizer)) for _ in range(2)]
        weight.copy_(lite.broadcast(weight))
        for state in optimizer.state.values():
            for value in state.values():
                value.copy_(lite.broadcast(value))
        lite.assert_in_sync(model, optimizer)
        if world.global_rank == 0:
            optimizer.state[model[0].bias]["exp_avg"][0] = 5.0
        found["state"] = told(lambda: lite.assert_in_sync(model, optimizer))
        with pytest.raises(SettingError, match="takes modules and optimizers"):
            lite.assert_in_sync(3)  # type: ignore[arg-type]
    return found


@lru_cache(maxsize=1)
def found() -> list[dict[str, Any]]:
    return run_ranks(2, drifting)


def test_ranks_in_step_are_left_alone() -> None:
    """Equal models and optimizers pass, step for step."""
    assert [each["in step"] for each in found()] == [[""] * 4] * 2


def test_the_first_parameter_that_differs_is_named_on_all_ranks() -> None:
    """One bit of one parameter on one rank is enough, and the error says whose it is."""
    for each in found():
        assert "the first difference is in parameter '2.weight', between rank 1 and rank 0." in each["asserted"]


def test_the_guard_looks_every_few_steps() -> None:
    """The extension compares by itself, at the step it was told to, optimizer state included."""
    for each in found():
        assert each["guarded"][0] == ""
        assert "out of sync at optimizer step 6: the first difference is in parameter '2.weight'" in each["guarded"][1]


def test_the_state_of_an_optimizer_is_compared_too() -> None:
    """A moment that differs is named by its parameter."""
    for each in found():
        assert "'exp_avg' of '0.bias' in Adam" in each["state"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(4), torch.ones(4)),
        (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])),
        (torch.zeros(4), torch.zeros(2, 2)),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
        (torch.tensor(0.0), torch.tensor(-0.0)),
    ],
)
def test_a_hash_tells_bits_places_shapes_and_dtypes_apart(one: torch.Tensor, other: torch.Tensor) -> None:
    """Two tensors that are not the same have different hashes; layout in memory does not count."""
    assert tensor_hashes([one]) != tensor_hashes([other])
    assert tensor_hashes([one.repeat(2, 1).T[:, 0]]) == tensor_hashes([one.clone()]) or one.dim() == 0


def test_names_are_the_models_own() -> None:
    """Parameters come first, then what the optimizer keeps for each, under the same names."""
    model, optimizer = net()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    names = [name for name, _ in named_tensors([model], [optimizer])]
    assert names[0] == "parameter '0.weight'"
    assert names[4:7] == [f"'{key}' of '0.weight' in Adam" for key in ("exp_avg", "exp_avg_sq", "step")]


def test_parts_cannot_be_compared() -> None:
    """Where every rank keeps a part there is nothing to compare, and that is said."""
    with pytest.raises(UnsupportedError, match=r"assert_in_sync\(\) compares replicated parameters"):
        check_replicated(("sharded",), "assert_in_sync()")


def guarded_parts(world: World) -> str:
    """Ask for the guard where every rank keeps a part; return what it is refused with."""
    with pytest.raises(UnsupportedError) as caught:
        Lite(plugins="drift-guard", strategy="fsdp", accelerator="cpu", devices=2).launch()
    return str(caught.value)


def test_the_guard_is_refused_where_parts_are_kept() -> None:
    """On all ranks, before anything is set up: it would compare nothing and say nothing."""
    told = "Extension 'drift-guard' compares replicated parameters, and this strategy shards the model"
    assert [each.startswith(told) for each in run_ranks(2, guarded_parts)] == [True, True]


def test_a_wrong_number_of_steps_is_refused() -> None:
    """Steps between two comparisons are counted from 1."""
    with pytest.raises(SettingError, match=r"DriftGuard\(every=0\): it is an integer from 1"):
        DriftGuard(every=0)
