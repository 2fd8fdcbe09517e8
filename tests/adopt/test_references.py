"""Replacing the parameters that an optimizer references."""

from __future__ import annotations

import collections
import copy
import functools
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from plugframe.base import repoint
from plugframe.errors import UnsupportedError


def replaced(count: int = 2) -> tuple[list[nn.Parameter], dict[Any, Any]]:
    """Return parameters, and their replacements."""
    old = [nn.Parameter(torch.full((3,), float(number))) for number in range(count)]
    return old, {parameter: copy.deepcopy(parameter) for parameter in old}


class Pair(NamedTuple):
    """A named tuple of two values."""

    first: Any
    second: Any


class Holder:
    """A user's object."""

    __slots__ = ("parameters",)

    def __init__(self, parameters: Any) -> None:
        self.parameters = parameters


class Wild(SGD):
    """An optimizer with every type of reference to its parameters."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=0.1)
        self.base = Adam(self.param_groups)
        self.flat = self.param_groups[0]["params"]
        self.pair = Pair(params[0], {"deep": (params[1], [params[0]])})
        self.by_id = {id(p): number for number, p in enumerate(params)}
        self.queue = collections.deque(params)
        self.unique = set(params)
        self.weak = [weakref.ref(p) for p in params]
        self.holder = Holder(list(params))
        self.bound = functools.partial(print, params[0], other=params[1])
        self.seen: list[Tensor] = []
        first = params[0]
        self.register_step_pre_hook(lambda *_: self.seen.append(first))
        self.loop = self


def test_every_reference_follows():
    """Lists, tuples, keys, ids, weak references, slots, closures and inner optimizers reference the new parameters."""
    old, successors = replaced()
    new = list(successors.values())
    optimizer = Wild(old)
    groups, flat = optimizer.param_groups, optimizer.flat
    repoint(optimizer, successors)
    assert optimizer.param_groups is groups
    assert optimizer.flat is flat is groups[0]["params"]
    assert all(a is b for a, b in zip(flat, new, strict=True))
    assert optimizer.pair.first is new[0]
    assert optimizer.pair.second["deep"][0] is new[1]
    assert optimizer.pair.second["deep"][1][0] is new[0]
    assert optimizer.by_id == {id(p): number for number, p in enumerate(new)}
    assert list(map(id, optimizer.queue)) == list(map(id, new))
    assert set(map(id, optimizer.unique)) == set(map(id, new))
    assert [ref() for ref in optimizer.weak] == new
    assert optimizer.holder.parameters[1] is new[1]
    assert optimizer.bound.args[0] is new[0]
    assert optimizer.bound.keywords["other"] is new[1]
    assert optimizer.base.param_groups[0]["params"][0] is new[0]
    optimizer.step()
    assert optimizer.seen[0] is new[0]


@pytest.mark.parametrize("make", [functools.partial(torch.optim.LBFGS, lr=0.5, max_iter=3), Adam, SGD])
def test_state_and_lists_of_torchs_optimizers_follow(make: Any):
    """An optimizer that has stepped continues as if it had been made with the new parameters."""
    expected, _ = replaced()
    old, successors = replaced()
    runs: list[tuple[Optimizer, list[nn.Parameter]]] = [(make(expected), expected), (make(old), old)]

    def step(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = sum(((p - 2) ** 4).sum() for p in parameters)  # type: ignore[assignment]
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]

    for optimizer, parameters in runs:
        step(optimizer, parameters)
    new = list(successors.values())
    with torch.no_grad():
        for parameter, value in zip(new, old, strict=True):
            parameter.copy_(value)
    repoint(runs[1][0], successors)
    step(runs[0][0], expected)
    step(runs[1][0], new)
    for got, want in zip(new, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_state_entries_are_converted():
    """``convert`` gets each entry of a replaced parameter's state; others are unchanged and in order."""
    old, successors = replaced()
    kept = nn.Parameter(torch.ones(3))
    optimizer = SGD([old[0], kept, old[1]], lr=0.1, momentum=0.9)
    for parameter in (old[0], kept, old[1]):
        parameter.grad = torch.ones(3)
    optimizer.step()
    repoint(optimizer, successors, convert=lambda entry, before, after: entry.double())
    new = list(successors.values())
    assert list(map(id, optimizer.state)) == list(map(id, (new[0], kept, new[1])))
    dtypes = [entry["momentum_buffer"].dtype for entry in optimizer.state.values()]
    assert dtypes == [torch.float64, torch.float32, torch.float64]


def test_a_view_of_an_old_parameter_is_refused():
    """An optimizer's flat view of a parameter cannot be replaced: the error has its path."""
    old, successors = replaced()
    optimizer: Any = SGD(old, lr=0.1)
    optimizer.views = {"first": old[0].detach().view(-1)}
    with pytest.raises(UnsupportedError, match=r"SGD\.views\['first'\] is a view of a parameter"):
        repoint(optimizer, successors)


def test_modules_are_left_to_set_up():
    """Modules that an optimizer references are not searched."""
    old, successors = replaced(1)
    optimizer: Any = SGD(old, lr=0.1)
    optimizer.model = nn.Module()
    optimizer.model.weight = old[0]
    repoint(optimizer, successors)
    assert optimizer.model.weight is old[0]
