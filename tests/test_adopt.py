"""Your own objects back: what set-up returns is what was given."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from plugframe import Lite, OrderError, SettingError, UsageError


class Net(nn.Module):
    """A model with everything people put on one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.calls = 0
        self._width = 3

    @property
    def width(self) -> int:
        return self._width

    @width.setter
    def width(self, value: int) -> None:
        self._width = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).square().mean()

    def count(self) -> int:
        self.calls += 1
        return self.calls


class Copying(Net):
    """A model that copies and pickles in its own way."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Copying:
        twin = Copying()
        twin.load_state_dict(self.state_dict())
        twin.calls = 99
        return twin


@pytest.fixture
def lite() -> Iterator[Lite]:
    with Lite(accelerator="cpu", devices=1) as lite:
        yield lite


def test_setup_returns_the_same_objects(lite: Lite) -> None:
    """``setup`` gives back the very objects it was given; ``isinstance``, attributes and methods hold."""
    model, optimizer = Net(), torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    keys = list(model.state_dict())
    ready, prepared, returned = lite.setup(model, optimizer, scheduler=scheduler)
    assert ready is model
    assert prepared is optimizer
    assert returned is scheduler
    assert isinstance(model, Net)
    assert isinstance(optimizer, torch.optim.SGD)
    assert list(model.state_dict()) == keys
    assert model.module is model
    assert model.body[0].in_features == 4
    assert type(model).__name__ == "Net"
    assert repr(model) == repr(Net())


def test_properties_are_set_without_being_read(lite: Lite) -> None:
    """Assigning a property runs its setter alone."""
    model = lite.setup(Net())
    model.width = 7
    assert model._width == 7
    assert model.width == 7


def test_a_bare_sequential_can_be_indexed(lite: Lite) -> None:
    """Indexing, iterating and ``len`` of a set-up ``Sequential`` work."""
    model = lite.setup(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert isinstance(model[0], nn.Linear)
    assert len(model) == 2
    assert len(list(model)) == 2


@pytest.mark.parametrize("cls", [Net, Copying])
def test_copies_and_pickles_are_plain(lite: Lite, cls: type[Net]) -> None:
    """``deepcopy``, ``copy``, ``pickle`` and ``torch.save`` of a set-up module give a plain one that works."""
    model = lite.setup(cls())
    for twin in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is cls
        assert torch.equal(twin(torch.ones(1, 4)), model(torch.ones(1, 4)))
    assert copy.deepcopy(model).calls == (99 if cls is Copying else 0)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is cls


def test_a_module_that_refers_to_itself_can_be_copied(lite: Lite) -> None:
    """A copy of a module that holds a reference to itself refers to the copy."""
    model = Net()
    object.__setattr__(model, "me", [model])
    lite.setup(model)
    twin = copy.deepcopy(model)
    assert twin.me[0] is twin
    assert pickle.loads(pickle.dumps(model)).me[0].__class__ is Net


def test_optimizers_pickle_and_schedule(lite: Lite) -> None:
    """A set-up optimizer pickles, deep-copies, and works with schedulers made before or after."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    before = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    lite.setup(model, optimizer)
    after = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        lite.backward(model(torch.ones(1, 4)).sum())
        optimizer.step()
        before.step()
        after.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 16)
    assert type(pickle.loads(pickle.dumps(optimizer))) is torch.optim.AdamW
    assert type(copy.deepcopy(optimizer)) is torch.optim.AdamW


def test_step_hooks_of_torch_run_once(lite: Lite) -> None:
    """torch's own step hooks see one call for each step."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lite.setup(model, optimizer)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    lite.backward(model(torch.ones(1, 4)).sum())
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert calls == ["pre", "post"] * 2


def test_closures_reach_the_optimizer(lite: Lite) -> None:
    """LBFGS re-evaluates its closure, and returns its loss."""
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    lite.setup(model, optimizer)
    losses: list[float] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean()
        lite.backward(loss)
        losses.append(loss.item())
        return loss

    first = optimizer.step(closure)
    assert len(losses) > 1
    assert first.item() == losses[0]
    assert losses[-1] < losses[0]


def test_an_unmarked_method_that_runs_a_part_is_refused(lite: Lite) -> None:
    """A method that runs a part with parameters must be marked; marked, it runs under the strategy."""
    model = lite.setup(Net())
    with pytest.raises(UsageError, match=r"Net.loss\(\) runs Linear 'body.0' outside .*forward_methods=\('loss',\)"):
        model.loss(torch.ones(1, 4))
    assert model.count() == 1
    model.mark_forward_method("loss")
    assert model.loss(torch.ones(1, 4)).ndim == 0
    other = lite.setup(Net(), forward_methods=("loss",))
    assert other.loss(torch.ones(1, 4)).ndim == 0
    with pytest.raises(SettingError, match=r"no method 'los' .*Did you mean 'loss'"):
        other.mark_forward_method("los")


def test_forward_called_directly_runs_under_the_strategy() -> None:
    """``model.forward(x)`` is not a way around precision and strategy."""
    with Lite(accelerator="cpu", devices=1, precision="bf16-true") as lite:
        model = lite.setup(nn.Linear(2, 2))
        assert model.forward(torch.ones(1, 2)).dtype is torch.float32
        assert model.weight.dtype is torch.bfloat16


def test_teardown_gives_plain_objects_back() -> None:
    """After ``teardown`` every object has its own class, step and sampler, also after an exception."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loader = torch.utils.data.DataLoader(list(range(6)), batch_size=2, shuffle=True)
    before = (dict(vars(loader)), set(vars(model)), set(vars(optimizer)))

    def fail() -> None:
        with Lite(accelerator="cpu", devices=1) as lite:
            lite.setup(model, optimizer)
            lite.setup_dataloaders(loader)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert type(model) is Net
    assert type(optimizer) is torch.optim.SGD
    assert type(loader) is torch.utils.data.DataLoader
    assert (dict(vars(loader)), set(vars(model)), set(vars(optimizer))) == before
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert len(list(loader)) == 3


def test_a_set_up_model_is_freed_with_its_last_reference(lite: Lite) -> None:
    """``Lite`` keeps no model alive."""
    model = lite.setup(Net())
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_wrong_objects_are_refused(lite: Lite) -> None:
    """Wrong types, doubles and foreign optimizers are named."""
    model = Net()
    loader = torch.utils.data.DataLoader([1, 2])
    with pytest.raises(SettingError, match=r"got a DataLoader: use lite\.setup_dataloaders"):
        lite.setup(loader)
    with pytest.raises(SettingError, match="DataLoader was passed as an optimizer"):
        lite.setup(model, loader)
    with pytest.raises(SettingError, match="4 of the 4 parameters of this SGD are not parameters of this Net"):
        lite.setup(model, torch.optim.SGD(Net().parameters(), lr=0.1))
    with pytest.raises(SettingError, match="takes torch DataLoaders, got list"):
        lite.setup_dataloaders([1])
    with pytest.raises(OrderError, match="backward\\(\\) before any model was set up"):
        lite.backward(torch.zeros((), requires_grad=True))
    lite.setup(model)
    with pytest.raises(OrderError, match="was set up already"):
        lite.setup(model)
    with pytest.raises(OrderError, match="Part '0' of this Sequential was set up already"):
        lite.setup(nn.Sequential(model))
    with pytest.raises(OrderError, match="clip_gradients\\(\\) takes a module that was set up"):
        lite.clip_gradients(Net(), torch.optim.SGD(Net().parameters(), lr=0.1), max_norm=1.0)


def test_a_submodule_named_module_stays_the_users(lite: Lite) -> None:
    """A model that has a part called ``module`` keeps it."""
    model = nn.Sequential()
    model.add_module("module", nn.Linear(1, 1))
    lite.setup(model)
    assert isinstance(model.module, nn.Linear)


def test_compile_before_and_after_setup(lite: Lite) -> None:
    """``module.compile()`` before set-up and ``torch.compile`` before or after compute what eager code does."""
    x = torch.ones(2, 4)
    eager = Net()
    before = copy.deepcopy(eager)
    before.compile(backend="aot_eager")
    lite.setup(before)
    wrapped = lite.setup(torch.compile(copy.deepcopy(eager), backend="aot_eager"))
    after = torch.compile(lite.setup(copy.deepcopy(eager)), backend="aot_eager")
    for model in (before, wrapped, after):
        loss = model(x).sum()
        lite.backward(loss)
        assert torch.allclose(loss, eager(x).sum())
        assert all(parameter.grad is not None for parameter in model.parameters())
