"""Parameter names in optimizer states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from plugframe import CheckpointMismatchError, Lite
from plugframe.state.parameter_names import differences, names_of, to_names, to_numbers


def model_and_optimizer(*order: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([named[name] for name in order or named])
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float(parameter.numel()))
    optimizer.step()
    return model, optimizer


def test_names_stand_for_numbers_and_back() -> None:
    """Converting a state to names and back returns the same state; torch accepts both."""
    model, optimizer = model_and_optimizer()
    names = names_of(optimizer, [model])
    assert names == [["0.weight", "0.bias", "1.weight", "1.bias"]]
    named = to_names(optimizer.state_dict(), names)
    assert set(named["state"]) == set(names[0])
    back = to_numbers(named, names)
    assert back["param_groups"] == optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(named)
    assert len(optimizer.state) == 4


def test_names_find_their_parameters_in_another_order() -> None:
    """An optimizer with the same parameters in another order loads each parameter's state."""
    model, optimizer = model_and_optimizer()
    named = to_names(optimizer.state_dict(), names_of(optimizer, [model]))
    other_model, other = model_and_optimizer("1.bias", "0.weight", "1.weight", "0.bias")
    other.load_state_dict(to_numbers(named, names_of(other, [other_model])))
    for parameter in other_model.parameters():
        assert other.state[parameter]["exp_avg"].shape == parameter.shape
    assert differences(named, [["0.weight", "0.bias", "1.weight", "2.bias"]]) == [
        "missing in parameter group 0: 2.bias",
        "unexpected in parameter group 0: 1.bias",
    ]


def test_numbers_stay_where_names_are_not_clear() -> None:
    """Parameters without a module, or with equal names, keep torch's numbers."""
    model, optimizer = model_and_optimizer()
    twin = nn.Sequential(nn.Linear(2, 3))
    assert names_of(optimizer, []) is None
    both = torch.optim.SGD([*model.parameters(), *twin.parameters()])
    assert names_of(both, [model, twin]) is None
    state = optimizer.state_dict()
    assert to_names(state, None) == state
    assert to_numbers(state, names_of(optimizer, [model]))["param_groups"] == state["param_groups"]


def test_checkpoints_are_keyed_by_names(tmp_path: Any) -> None:
    """Checkpoints contain names; files with numbers load too; other parameters are refused by name."""
    path = tmp_path / "state.safetensors"
    with Lite(accelerator="cpu", devices=1) as lite:
        _, optimizer = lite.setup(*model_and_optimizer())
        lite.save(path, {"optimizer": optimizer})
        content = lite.load(path)
        assert set(content["optimizer"]["state"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}
        lite.save(path, {"optimizer": optimizer.state_dict()})
        lite.load(path, {"optimizer": optimizer})
        lite.save(path, {"optimizer": optimizer})
        other = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        _, its = lite.setup(other, torch.optim.AdamW(other.parameters()))
        with pytest.raises(CheckpointMismatchError, match="optimizer: missing in parameter group 0: 2.weight, 2.bias"):
            lite.load(path, {"optimizer": its})
