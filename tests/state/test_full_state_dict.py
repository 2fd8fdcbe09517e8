"""``lite.state_dict`` on one rank; sharded states are tested on ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plugframe import Lite


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_state_is_plain(strategy: str) -> None:
    """Modules and optimizers return full copies that plain ones load, and that training does not change."""
    model, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    with Lite(accelerator="cpu", devices=1, strategy=strategy) as lite:
        lite.setup(model, optimizer)
        lite.backward(model(torch.ones(2, 3)).sum())
        optimizer.step()
        state, moments = lite.state_dict(model, all_ranks=True), lite.state_dict(optimizer)
        before = {name: value.clone() for name, value in state.items()}
        optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in state.items())
        assert all(type(value) is torch.Tensor for value in state.values())
        plain.load_state_dict(state)
        torch.optim.Adam(plain.parameters()).load_state_dict(moments)
        assert moments["state"][0]["exp_avg"].shape == (2, 3)
