"""Tensors of other stages: shapes without values, and an error where a value would be needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plugframe import UnsupportedError
from plugframe_builtins.pipeline.cut import make_cut
from plugframe_builtins.pipeline.stage import Boundaries
from plugframe_builtins.pipeline.stand_in import Backwards, OtherParameter, StandIn, give_up, resolved, stand_in

CPU = torch.device("cpu")


def missing(*shape: int) -> StandIn:
    return stand_in(torch.empty(*shape), "what 'layer' computes in stage 0", CPU)


@pytest.fixture
def other() -> Any:
    """A parameter of another stage."""
    parameter = nn.Parameter(torch.ones(3, 2))
    give_up(parameter, "parameter 'weight' of stage 1", Backwards())
    return parameter


@pytest.mark.parametrize(
    ("compute", "shape"),
    [
        (lambda x: x + torch.ones(3, 2), (3, 2)),
        (lambda x: torch.ones(4, 3) @ x, (4, 2)),
        (lambda x: nn.functional.linear(x, torch.ones(5, 2)), (3, 5)),
        (lambda x: x.to("cpu", torch.float64).cumsum(1)[:, None], (3, 1, 2)),
        (lambda x: torch.zeros_like(x).masked_fill(torch.ones(3, 2, dtype=torch.bool), 1.0), (3, 2)),
        (lambda x: torch.stack([x, x.cpu()]), (2, 3, 2)),
        (lambda x: x.new_zeros(7), (7,)),
    ],
)
def test_computing_gives_shapes(compute: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    """Results have the shape of torch's, on the device that the values are on, and say what they depend on."""
    found = compute(missing(3, 2))
    assert isinstance(found, StandIn)
    assert tuple(found.shape) == shape
    assert found.device == CPU
    assert not found.is_meta
    assert repr(found) == "<what 'layer' computes in stage 0>"


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x.sum()),
        lambda x: torch.ones(3, 2).add_(x),
        lambda x: torch.ones(3, 2).copy_(x),
        lambda x: torch.ones(4, 3, 2).__setitem__(0, x),
        lambda x: torch.add(torch.ones(3, 2), x, out=torch.ones(3, 2)),
        lambda x: torch._foreach_mul_([torch.ones(3, 2)], x.sum()),
        lambda x: torch._foreach_add_([torch.ones(3, 2)], [x]),
    ],
)
def test_values_are_an_error(read: Callable[[Tensor], Any]) -> None:
    """Reading a value, or writing one into a tensor of this rank, names what is missing."""
    with pytest.raises(
        UnsupportedError, match="needs values that this rank does not have: what 'layer' computes in stage 0"
    ):
        read(missing(3, 2))


def test_what_was_received_takes_the_place() -> None:
    """Computing with a stand-in then gives values."""
    tensor = missing(3, 2)
    tensor.value = torch.full((3, 2), 2.0)
    assert torch.equal(tensor * torch.ones(3, 2), tensor.value)
    assert resolved({"x": [tensor]})["x"][0] is tensor.value


def test_loops_over_all_parameters_act_on_those_of_this_rank(other: Any) -> None:
    """In-place functions over lists run for tensors with values; the object keeps what is no value."""
    own = nn.Parameter(torch.ones(3, 2))
    with torch.no_grad():
        for parameter in (own, other):
            parameter.mul_(2.0)
            parameter.data.clamp_(max=1.5)
            nn.init.ones_(parameter)
        torch._foreach_mul_([own, other], 3.0)
        torch._foreach_add_([own, other], [torch.ones(3, 2), torch.ones(3, 2)])
    assert torch.equal(own.detach(), torch.full((3, 2), 4.0))
    assert isinstance(other, OtherParameter)
    assert (other.shape, other.dtype, other.requires_grad, len(other)) == ((3, 2), torch.float32, True, 3)
    assert other in {other}
    other.requires_grad_(False)
    assert not other.requires_grad
    assert other.untyped_storage().nbytes() == 4


def test_a_gradient_is_there_after_a_backward(other: Any) -> None:
    """It has a shape and no values, and goes with zero_grad()."""
    optimizer = torch.optim.SGD([other], lr=0.1)
    assert other.grad is None
    other.backwards.count += 1
    assert other.grad.shape == other.shape
    assert repr(other.grad) == "<the gradient of parameter 'weight' of stage 1>"
    optimizer.zero_grad(set_to_none=False)
    assert other.grad is not None
    optimizer.zero_grad()
    assert other.grad is None
    other.backwards.count += 1
    assert other.grad is not None


class Rotary(nn.Module):
    """A module with a buffer beside layers of several stages."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.positions = nn.Module()
        self.positions.register_buffer("table", torch.ones(2))


def test_modules_with_buffers_only_are_on_every_rank() -> None:
    """Unless the cut puts them into a stage."""
    cut = make_cut(Rotary(), ["layers.1"], 2, "split=")
    assert cut.units == {"layers.0": 0, "layers.1": 1}
    assert cut.owners["positions.table"] is None
    cut = make_cut(Rotary(), [["layers.0"], ["layers.1", "positions"]], 2, "split=")
    assert cut.units == {"layers.0": 0, "layers.1": 1, "positions": 1}
    assert cut.owners["positions.table"] == 1


class Picking(nn.Module):
    """Returns the rows that it likes."""

    def forward(self, x: Tensor) -> Tensor:
        return x[x.sum(1) > 0]


class Chooses(nn.Module):
    """Computes with rows whose number depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.picks, self.last = nn.Linear(2, 2), nn.Sequential(Picking(), nn.Linear(2, 2)), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.last(x + self.picks(x).sum(0))
        return out


def test_shapes_come_from_the_rank_that_computes_them() -> None:
    """Other ranks go on with them; a module that returns other shapes in a later call is refused."""
    torch.manual_seed(0)
    model = Chooses()
    cut = make_cut(model, [["first", "picks"], ["last"]], 2, "split=")
    boundaries = Boundaries(model, cut, CPU)
    x = torch.randn(6, 2)
    with boundaries.seeing() as seen:
        _, sent = boundaries.run(0, lambda: model(x), [])
    boundaries.results = seen
    assert boundaries.run(1, lambda: model(missing(6, 2)), sent)[0]
    boundaries.run(0, lambda: model(x), [])
    with pytest.raises(UnsupportedError, match="'picks' returned tensors of shapes .* depend on shapes only"):
        boundaries.run(0, lambda: model(10 * x.abs()), [])
