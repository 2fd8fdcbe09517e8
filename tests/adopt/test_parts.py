"""The source of a method says whether it runs submodules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from plugframe.adopt.parts import runs_parts


class Block(nn.Module):
    """A block with a method that runs its part, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2)
        self.attention = nn.Linear(2, 2)

    def encode(self, x: Any) -> Any:
        return self.norm(x)

    def size(self) -> int:
        return self.norm.weight.numel()


class Model(nn.Module):
    """Methods that run submodules in the ways that scripts do, and others that only look at them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Block()
        self.layers = nn.ModuleList([Block(), Block()])
        self.parts = nn.ModuleDict({"head": nn.Linear(2, 2)})
        self.net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.drop = nn.Dropout()

    def forward(self, x: Any) -> Any:
        return self.encoder(x)

    def run_child(self, x: Any) -> Any:
        return self.encoder.attention(x)

    def run_element(self, x: Any) -> Any:
        return self.layers[0](x) + self.parts["head"](x)

    def run_part_of_element(self, x: Any) -> Any:
        return self.layers[0].attention(x)

    def run_loop(self, x: Any) -> Any:
        for number, layer in enumerate(self.layers):
            x = layer(x) * number
        return x

    def run_parts_in_loop(self, x: Any) -> Any:
        return [block.norm(x) for block in self.layers]

    def run_alias(self, x: Any) -> Any:
        net = self.net
        return net(x)

    def run_checkpoint(self, x: Any) -> Any:
        return checkpoint(self.encoder, x, use_reentrant=False)

    def run_method(self, x: Any) -> Any:
        return self.encoder.encode(x)

    def run_indirectly(self, x: Any) -> Any:
        return self.run_loop(x)

    def run_forward(self, x: Any) -> Any:
        return self.forward(x)

    def call_itself(self, x: Any) -> Any:
        return self(x)

    def count(self) -> int:
        return sum(p.numel() for p in self.parameters()) - self.layers[0].norm.weight.numel() + self.encoder.size()

    def groups(self) -> Any:
        return [{"params": layer.parameters()} for layer in self.layers] + [dict(self.net.named_parameters())]

    def initialise(self) -> None:
        nn.init.ones_(self.encoder.norm.weight)
        for layer in self.layers:
            layer.attention.weight.data.zero_()
        self.apply(print)

    def dropped(self, x: Any) -> Any:
        return self.drop(x)

    def recursive(self) -> Any:
        return self.recursive()


class Derived(Model):
    """A class that runs a part with super()."""

    def run_indirectly(self, x: Any) -> Any:
        return super().run_indirectly(x)


METHODS = [name for name in vars(Model) if not name.startswith("_") and name != "forward"]


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_run_submodules_are_found(name: str) -> None:
    """Those called ``run…`` do, the others do not, or only by a call of the model."""
    assert runs_parts(Model(), name) == name.startswith("run")
    assert runs_parts(Derived(), "run_indirectly")


def test_a_method_without_source_is_not_found() -> None:
    """What was compiled from a string has no source to read."""
    names: dict[str, Any] = {"torch": torch}
    exec("class Made(torch.nn.Linear):\n    def method(self): return self.part()", names)
    assert not runs_parts(names["Made"](1, 1), "method")
