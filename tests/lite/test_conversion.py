"""What a precision does to a module is held against what the strategy supports."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plugframe import Lite, OrderError, Plugin, UnsupportedError, hookimpl
from plugframe.base import Precision, Strategy


class Picky(Strategy):
    """Supports plain modules only."""

    plugin = Plugin(
        factory=f"{__name__}:Picky",
        conflicts={"precision": ("replaces-modules", "tensor-subclasses", "float16-parameters")},
    )


class Int8Weight(torch.Tensor):
    """A subclass, as quantized weights are."""


class _Other(nn.Linear):
    pass


class Converts(Precision):
    """Does what it does not list."""

    def __init__(self, how: str) -> None:
        self.how = how

    @hookimpl
    def precision_convert_module(self, module: nn.Module) -> nn.Module:
        layer = module.get_submodule("0")
        if self.how == "replaces-modules":
            module.add_module("0", _Other(2, 2))
        elif self.how == "tensor-subclasses":
            layer.weight = nn.Parameter(torch.zeros(2, 2).as_subclass(Int8Weight))
        elif self.how == "float16-parameters":
            layer.half()
        return module


@pytest.mark.parametrize(
    ("how", "shown"),
    [
        ("replaces-modules", "submodule '0' is a _Other"),
        ("tensor-subclasses", "parameter '0.weight' is a Int8Weight"),
        ("float16-parameters", "parameter '0.weight' is torch.float16"),
    ],
)
def test_an_unlisted_conversion_is_refused(how: str, shown: str) -> None:
    """Set-up raises, with both names and the submodule or parameter that shows it."""
    with Lite(accelerator="cpu", devices=1, strategy=Picky(), precision=Converts(how)) as lite:
        model = nn.Sequential(nn.Linear(2, 2))
        with pytest.raises(UnsupportedError, match=f"'Picky' does not support '{how}', .*'Converts'.* its {shown}"):
            lite.setup(model)


class Rounds(Precision):
    """Trains on rounded weights, and ends in integers."""

    @hookimpl
    def precision_finalize(self, module: nn.Module) -> nn.Module:
        layer = module.get_submodule("0")
        layer.weight.data.round_()  # type: ignore[operator, union-attr]
        return module


def test_a_trained_module_is_finalized() -> None:
    """The precision gets a plain module; one that was not set up, or is sharded, is refused."""
    with Lite(accelerator="cpu", devices=1, precision=Rounds()) as lite:
        model = nn.Sequential(nn.Linear(2, 2))
        with pytest.raises(OrderError, match="takes a module that was set up"):
            lite.finalize(model)
        lite.setup(model)
        assert type(model) is not nn.Sequential
        final = lite.finalize(model)
        assert final is model
        assert type(final) is nn.Sequential
        assert torch.equal(model[0].weight, model[0].weight.round())
    with Lite(accelerator="cpu", devices=1, strategy="fsdp", precision=Rounds()) as lite:
        model = lite.setup(nn.Sequential(nn.Linear(2, 2)))
        with pytest.raises(UnsupportedError, match="strategy 'fsdp' holds shards of it: save it"):
            lite.finalize(model)


def test_what_the_user_did_is_no_conversion() -> None:
    """A module that came in float16 is the user's choice."""
    with Lite(accelerator="cpu", devices=1, strategy=Picky(), precision=Converts("")) as lite:
        lite.setup(nn.Sequential(nn.Linear(2, 2).half()))


def test_a_stranger_s_precision_works_where_a_built_in_does() -> None:
    """fsdp and deepspeed list no names: a precision object of one's own is taken."""
    for strategy in ("fsdp", "tensor_parallel", "deepspeed"):
        lite = Lite(accelerator="cpu", devices=1, strategy=strategy, precision=Converts(""))
        assert lite.plan.choices["precision"].name == "Converts"
