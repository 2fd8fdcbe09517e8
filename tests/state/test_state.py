"""Loading of states, and refusals before anything is written."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plugframe import CheckpointMismatchError, Lite

Pair = namedtuple("Pair", ["model", "step"])


class Refusing:
    """An object that returns its state and refuses to load one."""

    def state_dict(self) -> dict[str, Any]:
        return {"a": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError("no")


@pytest.fixture
def lite() -> Iterator[Lite]:
    with Lite(accelerator="cpu", devices=1) as lite:
        yield lite


def zeroed(model: nn.Linear) -> torch.Tensor:
    """Return the weights, and set them to zero."""
    before = model.weight.detach().clone()
    nn.init.zeros_(model.weight)
    return before


@pytest.mark.parametrize(
    ("saved", "asked", "problem"),
    [
        ({"a": 1, "b": 2}, {"a": 0}, "unexpected: 'nest.b'"),
        ({"a": 1}, {"a": 0, "b": 0}, "missing: 'nest.b'"),
        ({"a": 3}, {"a": torch.zeros(1)}, "nest.a is a tensor, the checkpoint has 3"),
        (
            {"a": torch.tensor([1.5])},
            {"a": torch.tensor([1])},
            "nest.a is of torch.int64, which cannot hold .*float32",
        ),
        ({"a": torch.ones(2)}, {"a": torch.ones(1)}, r"nest.a has shape \(1,\), the checkpoint has \(2,\)"),
    ],
)
def test_what_does_not_fit_inside_is_named(lite: Lite, tmp_path: Path, saved: Any, asked: Any, problem: str) -> None:
    """Keys, types and dtypes are validated at every depth before anything is written."""
    model = nn.Linear(2, 2)
    lite.save(tmp_path / "x", {"nest": {"model": model, **saved}, "model": model})
    zeroed(model)
    with pytest.raises(CheckpointMismatchError, match=problem):
        lite.load(tmp_path / "x", {"nest": {"model": model, **asked}, "model": model})
    assert not model.weight.any()


def test_tuples_come_back_whole(lite: Lite, tmp_path: Path) -> None:
    """Objects in a tuple are restored in place; its plain values in a new tuple of its type."""
    model = nn.Linear(2, 2)
    lite.save(tmp_path / "x", {"pair": Pair(model, 3), "plain": (model, [4, {"deep": (model, 5)}])})
    kept = zeroed(model)
    state: dict[str, Any] = {"pair": Pair(model, 0), "plain": (model, [0, {"deep": (model, 0)}])}
    lite.load(tmp_path / "x", state)
    assert torch.equal(model.weight, kept)
    assert state["pair"] == Pair(model, 3)
    assert state["plain"] == (model, [4, {"deep": (model, 5)}])


def test_an_object_that_refuses_its_state_leaves_the_others_alone(lite: Lite, tmp_path: Path) -> None:
    """Objects that validate themselves are loaded first: if one raises, no model has changed."""
    model = nn.Linear(2, 2)
    lite.save(tmp_path / "x", {"model": model, "refusing": Refusing()})
    zeroed(model)
    with pytest.raises(KeyError, match="no"):
        lite.load(tmp_path / "x", {"model": model, "refusing": Refusing()})
    assert not model.weight.any()


def test_compiled_or_not_a_checkpoint_is_one(lite: Lite, tmp_path: Path) -> None:
    """The state of a compiled module has the plain module's keys, also in torch's own files."""
    plain = nn.Linear(2, 2)
    compiled: Any = torch.compile(plain, backend="eager")
    lite.setup(compiled)
    lite.save(tmp_path / "x", {"model": compiled})
    torch.save(compiled.state_dict(), tmp_path / "raw")
    assert list(lite.load(tmp_path / "x")["model"]) == ["weight", "bias"]
    kept = zeroed(plain)
    lite.load(tmp_path / "x", {"model": compiled})
    assert torch.equal(plain.weight, kept)
    other = nn.Linear(2, 2)
    lite.load(tmp_path / "x", {"model": other})
    assert torch.equal(other.weight, kept)
    zeroed(other)
    lite.load_raw(tmp_path / "raw", other)
    assert torch.equal(other.weight, kept)
    zeroed(plain)
    lite.load_raw(tmp_path / "raw", compiled)
    assert torch.equal(plain.weight, kept)
