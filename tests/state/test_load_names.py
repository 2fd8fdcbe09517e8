"""Matching of names in a saved state, tied weights, and objects free of references to the file."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plugframe import CheckpointMismatchError, Lite
from plugframe.checkpoint import StoredTensor
from plugframe.hooks.world import World
from plugframe.state.key_matching import match
from ranks import run_checks


class On:
    """A job, and a folder that all its ranks can read."""

    def __init__(self, lite: Lite, folder: str) -> None:
        self.lite = lite
        self.folder = folder

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def put(self, name: str, state: Any) -> str:
        """Write a file with torch on rank 0."""
        self.lite.barrier()
        if self.lite.is_global_zero:
            torch.save(state, self.path(name))
        self.lite.barrier()
        return self.path(name)


@contextmanager
def sharded(world: World, *, folder: str) -> Iterator[On]:
    """Two ranks with a sharded model, and tensors read on demand."""
    with Lite(accelerator="cpu", devices=world.world_size, strategy="fsdp") as lite:
        lite.launch()
        yield On(lite, folder)


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 2))


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[no-any-return]


def values(module: nn.Module) -> dict[str, Tensor]:
    return {key: whole(value.detach()) for key, value in module.state_dict().items()}


def same_values(module: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(values(module).values(), values(other).values(), strict=True))


def everywhere(tree: Any) -> Iterator[Any]:
    """Yield all values in containers."""
    yield tree
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ():
        yield from everywhere(item)


PREFIXES: dict[str, Callable[[str], str]] = {
    "module": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "both": lambda key: f"_orig_mod.module.{key}",
    "other way": lambda key: f"module._orig_mod.{key}",
    "inside": lambda key: key.replace("1.0.", "1._orig_mod.0."),
    "a part": lambda key: key.replace("0.", "0.module._orig_mod.", 1) if key.startswith("0.") else key,
    "checkpointed": lambda key: key.replace("2.", "2._checkpoint_wrapped_module."),
}


def names_that_differ_by_wrappers_load(on: On) -> None:
    """Wrapper components are ignored anywhere in a name; other names are refused."""
    source, model = net(1), net(2)
    model, _ = on.lite.setup(model, torch.optim.Adam(model.parameters()))
    for rename in PREFIXES.values():
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        state = {rename(key): value for key, value in source.state_dict().items()}
        on.lite.load_raw(on.put("x.pt", state), model)
        assert same_values(model, source)
        state["more.weight"] = state.pop(rename("2.weight"))
        on.put("x.pt", state)
        with pytest.raises(CheckpointMismatchError, match="missing in object: 2.weight; unexpected in object: more.we"):
            on.lite.load_raw(on.path("x.pt"), model)


def test_a_name_that_could_mean_two_is_not_guessed() -> None:
    """A submodule called "module" counts as its own; unmatched names are unexpected."""
    assert match(["w", "module.w"], ["w", "_orig_mod.w"]) == {"w": "w"}
    assert match(["a.w"], ["module.a.w", "_orig_mod.a.w"]) == {}
    assert match(["module.w", "n"], ["w", "n"]) == {"module.w": "w", "n": "n"}
    assert match(["w"], [3, "w"]) == {"w": "w"}


def compiled_parts_or_not_a_checkpoint_is_one(on: On) -> None:
    """Model and optimizer load from a model with compiled submodules into one without, and back."""

    def compiled(model: nn.Sequential) -> nn.Sequential:
        model[1] = torch.compile(model[1], backend="eager")  # type: ignore[assignment]
        return model

    pairs = []
    for model in (compiled(net(1)), net(2)):
        own, optimizer = on.lite.setup(model, torch.optim.Adam(model.parameters(), lr=0.1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler's own
            on.lite.backward(own(torch.ones(2, 4)).mean(), model=own)
        optimizer.step()
        pairs.append((own, optimizer))
    for (first, first_optimizer), (second, second_optimizer) in (pairs, pairs[::-1]):
        on.lite.save(on.path("x"), {"model": first, "optimizer": first_optimizer})
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.zero_()
        on.lite.load(on.path("x"), {"model": second, "optimizer": second_optimizer})
        assert same_values(first, second)
        saved, loaded = (
            [whole(each) for each in everywhere(optimizer.state_dict()["state"]) if isinstance(each, Tensor)]
            for optimizer in (first_optimizer, second_optimizer)
        )
        assert len(saved) == len(loaded) == 18
        assert all(torch.equal(a, b) for a, b in zip(saved, loaded, strict=True))


class Wrapper(nn.Module):
    """Holds a model under the name that data parallel wrappers use."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]


def a_wrapper_of_the_users_own_makes_no_difference(on: On) -> None:
    """Model and optimizer load from a wrapped model into an unwrapped one, and back, by name."""
    pairs = []
    for model in (Wrapper(net(1)), net(2)):
        own, optimizer = on.lite.setup(model, torch.optim.Adam(list(model.parameters())[:: 1 if pairs else -1], lr=0.1))
        on.lite.backward(own(torch.ones(2, 4)).mean(), model=own)
        optimizer.step()
        pairs.append((own, optimizer))
    for (first, first_optimizer), (second, second_optimizer) in (pairs, pairs[::-1]):
        on.lite.save(on.path("x"), {"model": first, "optimizer": first_optimizer})
        on.lite.load(on.path("x"), {"model": second, "optimizer": second_optimizer})
        assert same_values(first, second)
        moments = [
            {
                name.removeprefix("module."): whole(optimizer.state[parameter]["exp_avg"])
                for name, parameter in model.named_parameters()
            }
            for model, optimizer in ((first, first_optimizer), (second, second_optimizer))
        ]
        assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.zero_()


class Tied(nn.Module):
    """An embedding that shares its weight with the head."""

    def __init__(self, seed: int, *, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))  # type: ignore[no-any-return]


def one_of_two_tied_names_is_enough(on: On) -> None:
    """A file with tied weights under one of the names loads; a file with neither does not."""
    source, model = Tied(1), Tied(2)
    own, _ = on.lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for kept in ("table.weight", "head.weight"):
        nn.init.zeros_(own.table.weight)
        on.lite.load_raw(on.put("x.pt", {f"module.{kept}": source.table.weight.detach()}), own)
        assert torch.equal(whole(own.table.weight.detach()), source.table.weight)
        assert torch.equal(whole(own.head.weight.detach()), source.table.weight)
    on.put("y.pt", {})
    with pytest.raises(CheckpointMismatchError, match=r"missing in object: table\.weight, head\.weight"):
        on.lite.load_raw(on.path("y.pt"), own)


def two_values_for_tied_weights_are_refused(on: On) -> None:
    """Different values for tied weights are refused: one of them would be lost."""
    own = on.lite.setup_module(Tied(2))
    source = Tied(1, tied=False)
    on.put("x.pt", source.state_dict())
    with pytest.raises(CheckpointMismatchError, match="table.weight and head.weight are one tensor here"):
        on.lite.load_raw(on.path("x.pt"), own)
    source.head.weight.data.copy_(source.table.weight.data)
    on.lite.load_raw(on.put("y.pt", {key: value.clone() for key, value in source.state_dict().items()}), own)
    assert torch.equal(whole(own.head.weight.detach()), source.head.weight)


class Extra(nn.Linear):
    """A module with an extra state."""

    kept: Any = None

    def get_extra_state(self) -> Any:
        return {"seen": torch.arange(3.0), "deep": [{"t": torch.ones(2)}], "n": 1}

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


def rate(value: float, *, tensor: bool) -> Any:
    return torch.tensor(value, dtype=torch.float64) if tensor else value


def nothing_of_the_file_is_left_in_the_objects(on: On) -> None:
    """Optimizer settings, extra states and lists hold values; a learning rate keeps its current type."""
    for number in range(4):
        saved, now = rate(0.5, tensor=number < 2), rate(0.25, tensor=number % 2 == 0)
        model = Extra(3, 2)
        model, optimizer = on.lite.setup(model, torch.optim.Adam(model.parameters(), lr=saved, foreach=False))
        on.lite.backward(model(torch.ones(2, 3)).mean(), model=model)
        optimizer.step()
        plain = {"t": torch.ones(3), "l": [torch.ones(1)]}
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "plain": plain}
        on.lite.save(on.path("x"), state)
        optimizer.param_groups[0]["lr"] = now
        on.lite.load(on.path("x"), state)
        left = [*everywhere(optimizer.state_dict()), *everywhere(model.kept), *everywhere(state["plain"])]
        assert not any(isinstance(each, StoredTensor) for each in left)
        loaded = optimizer.param_groups[0]["lr"]
        assert type(loaded) is type(now)
        assert float(loaded) == 0.5
        on.lite.backward(model(torch.ones(2, 3)).mean(), model=model)
        optimizer.step()


def a_state_of_an_optimizer_that_cannot_be_is_refused(on: On) -> None:
    """Entries of other shapes, and invalid states, are refused before anything is written."""
    model = nn.Linear(3, 2)
    model, optimizer = on.lite.setup(model, torch.optim.Adam(model.parameters()))
    on.lite.backward(model(torch.ones(2, 3)).mean())
    optimizer.step()
    on.lite.save(on.path("x"), {"model": model, "optimizer": optimizer})
    content = on.lite.load(on.path("x"))
    before = values(model)
    name = next(iter(content["optimizer"]["state"]))
    content["optimizer"]["state"][name]["exp_avg"] = torch.ones(7)
    broken: list[tuple[Any, str]] = [
        (content["optimizer"], r"exp_avg of weight has shape \(2, 3\), the checkpoint has \(7,\)"),
        ({"state": [], "param_groups": []}, "is not the state of an optimizer"),
        ({"state": {}, "param_groups": [{"params": "abc"}]}, "is not the state of an optimizer"),
        ({"state": {}, "param_groups": [3]}, "is not the state of an optimizer"),
        ({"state": {name: 3}, "param_groups": content["optimizer"]["param_groups"]}, "the state of weight is a int"),
    ]
    for other, text in broken:
        on.put("y.pt", {**content, "optimizer": other, "model": {k: torch.zeros_like(v) for k, v in before.items()}})
        with pytest.raises(CheckpointMismatchError, match=text):
            on.lite.load(on.path("y.pt"), {"model": model, "optimizer": optimizer})
        assert all(torch.equal(value, before[key]) for key, value in values(model).items())


class Global(torch.optim.SGD):
    """An optimizer with a state that belongs to no parameter."""

    def step(self, closure: Any = None) -> Any:
        self.state["of_all"] = {"steps": torch.tensor(5.0), "n": 3}  # type: ignore[index]
        return super().step(closure)


def the_state_of_no_parameter_comes_back(on: On) -> None:
    """State that belongs to all parameters together is saved and loaded."""
    model = nn.Linear(3, 2)
    model, optimizer = on.lite.setup(model, Global(model.parameters(), lr=0.1))
    on.lite.backward(model(torch.ones(2, 3)).mean())
    optimizer.step()
    on.lite.save(on.path("x"), {"optimizer": optimizer})
    optimizer.state["of_all"] = {}  # type: ignore[index]
    on.lite.load(on.path("x"), {"optimizer": optimizer})
    assert {key: float(value) for key, value in optimizer.state["of_all"].items()} == {"steps": 5.0, "n": 3.0}  # type: ignore[index]


CHECKS = (
    names_that_differ_by_wrappers_load,
    compiled_parts_or_not_a_checkpoint_is_one,
    a_wrapper_of_the_users_own_makes_no_difference,
    one_of_two_tied_names_is_enough,
    two_values_for_tied_weights_are_refused,
    nothing_of_the_file_is_left_in_the_objects,
    a_state_of_an_optimizer_that_cannot_be_is_refused,
    the_state_of_no_parameter_comes_back,
)


@pytest.mark.parametrize("check", CHECKS)
def test_one_rank(check: Callable[[On], None], tmp_path: Path) -> None:
    """The rule in the check's docstring holds for an unsharded model."""
    with Lite(accelerator="cpu", devices=1) as lite:
        lite.launch()
        check(On(lite, str(tmp_path)))


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run every check on two ranks of one job."""
    return run_checks(2, functools.partial(sharded, folder=str(tmp_path_factory.mktemp("names"))), CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(check: Callable[[On], None], on_two_ranks: dict[str, str]) -> None:
    """The rule in the check's docstring holds for a sharded model."""
    assert not on_two_ranks[check.__name__], on_two_ranks[check.__name__]
