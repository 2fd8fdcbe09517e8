"""Gradients that a script drops, reads or replaces between a forward and its backward, under sharding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plugframe import Lite
from plugframe.hooks.world import World
from ranks import run_checks


def _zero_grad(model: nn.Module) -> None:
    model.zero_grad()


def _drop(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


def _halve(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad *= 0.5


def _replace(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = torch.ones_like(parameter)


def _keep(model: nn.Module) -> None:
    """Leave them, so that they are added up."""


@contextmanager
def ranks(world: World) -> Iterator[World]:
    yield world


def _trained(
    model: nn.Module, backward: Callable[[Tensor], None], x: Tensor, change: Callable[[nn.Module], None]
) -> Any:
    for _ in range(3):
        loss = model(x).square().mean()
        change(model)
        backward(loss)
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.data += -0.1 * parameter.grad
    return copy.deepcopy(model)


def gradients_change_between_forward_and_backward(world: World) -> None:
    """The weights are those of one process, however the script changes the gradients."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    for change in (_zero_grad, _drop, _clear, _halve, _replace, _keep):
        plain = _trained(copy.deepcopy(first), lambda loss: loss.backward(), x, change)
        with Lite(accelerator="cpu", devices=world.world_size, strategy="fsdp") as lite:
            model = lite.setup(copy.deepcopy(first))
            mine = x[lite.global_rank :: lite.world_size]
            found = _trained(model, lite.backward, mine, change)
        for one, other in zip(found.parameters(), plain.parameters(), strict=True):
            whole = one.full_tensor() if isinstance(one, DTensor) else one
            torch.testing.assert_close(whole, other, msg=lambda text, name=change.__name__: f"{name}: {text}")


@pytest.mark.ranks
def test_gradients_on_two_ranks() -> None:
    """See the check."""
    check = gradients_change_between_forward_and_backward
    failed = run_checks(2, ranks, [check], timeout_s=120.0)
    assert not failed[check.__name__], failed[check.__name__]
