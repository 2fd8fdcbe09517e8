"""Parameters that a precision replaces at set-up are trained, or set-up raises with their name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from plugframe import Lite
from plugframe.base import Precision
from plugframe.errors import SettingError
from plugframe.hooks import hookimpl


class Rounded(nn.Linear):
    """A layer like those of a quantising precision."""


class Replacing(Precision):
    """Replaces layers of a model by others with new parameters."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    @hookimpl
    def precision_convert_module(self, module: nn.Module) -> nn.Module:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                new = Rounded(child.in_features, child.out_features)
                new.load_state_dict(child.state_dict())
                if self.kind == "renamed":
                    new.packed = nn.Parameter(new.weight.detach().clone())
                    del new.weight
                new.requires_grad_(self.kind != "frozen")
                setattr(module, name, new)
        return module


class Own(torch.optim.SGD):
    """An optimizer with its own list of parameters."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.mine = [p for group in self.param_groups for p in group["params"]]


@pytest.mark.parametrize("apart", [False, True])
def test_the_optimizer_trains_the_new_parameters(apart: bool) -> None:
    """In its groups and its own lists, set up with the model or afterwards."""
    with Lite(accelerator="cpu", devices=1, precision=Replacing("plain")) as lite:
        module = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
        optimizer = Own(module.parameters())
        if apart:
            module = lite.setup_module(module)
            optimizer = lite.setup_optimizers(optimizer)
        else:
            module, optimizer = lite.setup(module, optimizer)
        assert type(module[0]) is Rounded
        assert list(map(id, optimizer.mine)) == list(map(id, module.parameters()))
        before = module[0].weight.detach().clone()
        lite.backward(module(torch.ones(3, 2)).sum())
        optimizer.step()
        assert not torch.equal(module[0].weight, before)


@pytest.mark.parametrize(("kind", "what"), [("renamed", "no longer exists"), ("frozen", "is no longer trainable")])
def test_a_parameter_without_a_successor_is_refused(kind: str, what: str) -> None:
    """A layer whose new parameters have other names, or are frozen, is refused by name."""
    with Lite(accelerator="cpu", devices=1, precision=Replacing(kind)) as lite:
        module = nn.Sequential(nn.Linear(2, 2))
        with pytest.raises(
            SettingError, match=rf"replaced parameter '0.weight', which this SGD updates, and it {what}"
        ):
            lite.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))


def test_parameters_that_no_optimizer_can_step_are_refused() -> None:
    """Expanded parameters and inference tensors are refused by name, unless frozen."""
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.ones(1, 2).expand(2, 2))
    with Lite(accelerator="cpu", devices=1) as lite:
        with pytest.raises(SettingError, match="Parameter 'weight' of this Linear is expanded"):
            lite.setup(module)
        with torch.inference_mode():
            other = nn.Linear(2, 2)
        with pytest.raises(SettingError, match="Parameter 'weight' of this Linear was made under torch.inference_mode"):
            lite.setup(other)
        lite.setup(module.requires_grad_(False))
