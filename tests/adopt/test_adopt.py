"""Adopting objects in place: set-up returns the objects it was given."""

from __future__ import annotations

import abc
import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from plugframe import Lite, OrderError, SettingError, UsageError


class Net(nn.Module):
    """A model with common attributes and properties."""

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
    """A model with its own copying and pickling."""

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
    """``setup`` returns the same objects; ``isinstance``, attributes and methods are unchanged."""
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
    """Assigning a property calls only its setter."""
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
    """``deepcopy``, ``copy``, ``pickle`` and ``torch.save`` of a set-up module return a plain one that works."""
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
    """The copy of a module that references itself references the copy."""
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
    """torch's step hooks are called once per step."""
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
    """LBFGS evaluates its closure several times, and returns its loss."""
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


class Hidden(Net):
    """A model with a method whose source does not show that it runs a submodule."""

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, "body")(x)  # noqa: B009


def test_an_unmarked_method_that_runs_a_part_runs_under_the_strategy_or_is_refused(lite: Lite) -> None:
    """A method whose source shows that it calls submodules runs under the strategy; another one must be marked."""
    x = torch.ones(1, 4)
    with Lite(accelerator="cpu", devices=1, precision="bf16-true") as half:
        model = half.setup(Hidden())
        assert model.loss(x).dtype is torch.float32
        with pytest.raises(UsageError, match=r"Hidden.hidden\(\) runs Linear 'body.0' .*forward_methods=\('hidden',\)"):
            model.hidden(x)
        assert model.count() == 1
        model.mark_forward_method("hidden")
        assert model.hidden(x).dtype is torch.float32
    alone = lite.setup(Hidden())
    assert torch.equal(alone.hidden(x), alone.body(x))  # one rank, one dtype: there is nothing to run under
    other = lite.setup(Net(), forward_methods=("loss",))
    assert other.loss(torch.ones(1, 4)).ndim == 0
    with pytest.raises(SettingError, match=r"no method 'los' .*Did you mean 'loss'"):
        other.mark_forward_method("los")


def test_forward_called_directly_runs_under_the_strategy() -> None:
    """``model.forward(x)`` does not bypass precision and strategy."""
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
    """Wrong types, duplicates and foreign optimizers are refused by name."""
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
    with pytest.raises(OrderError, match="Submodule '0' of this Sequential was set up already"):
        lite.setup(nn.Sequential(model))
    with pytest.raises(OrderError, match="clip_gradients\\(\\) takes a module that was set up"):
        lite.clip_gradients(Net(), torch.optim.SGD(Net().parameters(), lr=0.1), max_norm=1.0)


def test_a_submodule_named_module_stays_the_users(lite: Lite) -> None:
    """A model with a submodule called ``module`` keeps it."""
    model = nn.Sequential()
    model.add_module("module", nn.Linear(1, 1))
    lite.setup(model)
    assert isinstance(model.module, nn.Linear)


def test_compile_before_and_after_setup(lite: Lite) -> None:
    """``module.compile()`` before set-up, and ``torch.compile`` before or after it, compute the eager result."""
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


class Registered(nn.Module):
    """A class with ``__init_subclass__`` that requires an argument."""

    names: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, name: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registered.names.append(name)


class Known(Registered, name="known"):
    """A subclass of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Strict(type):
    """A metaclass that validates its classes."""

    made: ClassVar[list[str]] = []

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        if "version" not in namespace:
            raise TypeError("a version is needed")
        Strict.made.append(name)
        return super().__new__(cls, name, bases, namespace)


class Versioned(nn.Module, metaclass=Strict):
    """A class of that metaclass."""

    version = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Abstract(nn.Module, abc.ABC):
    """An abstract class."""

    @abc.abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor: ...


class Concrete(Abstract):
    """An implementation of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_classes_are_not_told_of_the_swap(lite: Lite) -> None:
    """Set-up calls no ``__init_subclass__`` or metaclass of the user's, and abstract classes work."""
    for module in (Known(), Versioned(), Concrete()):
        lite.setup(module)
        assert module(torch.ones(1)) == 1
        assert type(copy.deepcopy(module)) is type(module).__mro__[1]
    assert Registered.names == ["known"]
    assert Strict.made == ["Versioned"]
    assert isinstance(module, Abstract)
    assert not isinstance(Concrete(), type(module))
    assert isinstance(Concrete(), Concrete)


class Chatty:
    """A mix-in that is not a module, as in language models."""

    body: nn.Module

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def ask(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)  # type: ignore[operator,no-any-return]


class Speaker(nn.Module, Chatty):
    """A model with that mix-in, a private method and a generator method."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def _peek(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def stream(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        yield self.body(x)
        yield self.body(2 * x)


def test_methods_of_every_origin_run_under_the_strategy(lite: Lite) -> None:
    """Methods of mix-ins, private methods and generators run under the strategy like others."""
    x = torch.ones(1, 4)
    model = lite.setup(Speaker())
    assert model.ask(x).shape == (1, 2)
    with Lite(accelerator="cpu", devices=1, precision="bf16-true") as half:
        model = half.setup(Speaker())
        assert [each.dtype for each in (model.generate(x), *model.stream(x))] == [torch.float32] * 3
    with Lite(accelerator="cpu", devices=1, precision="bf16-true") as half:
        model = half.setup(Speaker(), forward_methods=("generate", "_peek", "stream"))
        results = [model.generate(x), model._peek(x), *model.stream(x)]
        assert [result.dtype for result in results] == [torch.float32] * 4
        assert len(list(model.stream(x))) == 2
        other = half.setup(Speaker())
        other.mark_forward_method("_peek")
        assert other._peek(x).dtype is torch.float32


def test_a_set_up_that_fails_changes_nothing() -> None:
    """A wrong method name is refused before the module is converted, and set-up works afterwards."""
    with Lite(accelerator="cpu", devices=1, precision="bf16-true") as lite:
        model = Net()
        with pytest.raises(SettingError, match="no method 'los'"):
            lite.setup(model, forward_methods=("los",))
        assert model.body[0].weight.dtype is torch.float32
        lite.setup(model)


class Checkpointed(nn.Module):
    """A model that recomputes a public method in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).relu()

    def forward(self, x: torch.Tensor, reentrant: bool) -> torch.Tensor:
        x = checkpoint(self.block, x, use_reentrant=reentrant)
        return checkpoint(lambda y: self.block(y), x, use_reentrant=reentrant)


@pytest.mark.parametrize("marked", [(), ("block",)])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_activation_checkpointing_of_public_methods(precision: str, marked: tuple[str, ...]) -> None:
    """A method that is recomputed in backward belongs to its forward."""
    with Lite(accelerator="cpu", devices=1, precision=precision) as lite:
        for reentrant in (False, True):
            model = lite.setup(Checkpointed(), forward_methods=marked)
            lite.backward(model(torch.ones(2, 4, requires_grad=True), reentrant).sum())
            assert model.body.weight.grad is not None


def test_parametrizations_come_and_go(lite: Lite) -> None:
    """A parametrization of a set-up module survives copies and tear-down, and can be removed."""
    weight_norm, remove = nn.utils.parametrizations.weight_norm, nn.utils.parametrize.remove_parametrizations
    x = torch.ones(1, 4)
    stays, goes = lite.setup(nn.Linear(4, 2)), lite.setup(nn.Linear(4, 2))
    for model in (stays, goes):
        weight_norm(model)
        assert torch.equal(copy.deepcopy(model)(x), model(x))
    remove(goes, "weight")
    expected = [model(x) for model in (stays, goes)]
    lite.teardown()
    assert type(goes) is nn.Linear
    assert stays.parametrizations
    assert "_plugframe" not in vars(stays)
    for model, before in zip((stays, goes), expected, strict=True):
        torch.testing.assert_close(model(x), before)


def test_scripted_modules_are_modules(lite: Lite) -> None:
    """A scripted or traced module trains, copies and is released."""
    x = torch.ones(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        modules: list[Any] = [torch.jit.script(nn.Linear(4, 2)), torch.jit.trace(nn.Linear(4, 2), x)]
        for module in modules:
            model, optimizer = lite.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
            lite.backward(model(x).sum())
            optimizer.step()
            assert torch.equal(copy.deepcopy(model)(x), model(x))
        lite.teardown()
        assert [module(x).shape for module in modules] == [(2, 2)] * 2


class Own(nn.Module):
    """A module with its own ``__deepcopy__`` that references itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(1, 1)
        self.me = [self]

    def __deepcopy__(self, memo: dict[int, Any]) -> Own:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return twin


def test_a_copy_made_by_hand_refers_to_itself(lite: Lite) -> None:
    """A class with its own ``__deepcopy__`` and a reference to itself is copied once."""
    twin = copy.deepcopy(lite.setup(Own()))
    assert type(twin) is Own
    assert twin.me[0] is twin


@pytest.mark.parametrize("module", [nn.LazyLinear(2), nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d())])
def test_a_module_without_shapes_is_refused(lite: Lite, module: nn.Module) -> None:
    """A lazy module changes its class in the first forward, which must come before set-up."""
    with pytest.raises(OrderError, match="has no shape yet: run one forward before lite.setup"):
        lite.setup(module)


def test_what_was_set_up_is_not_set_up_again(lite: Lite) -> None:
    """A submodule of a set-up module, and one object passed twice, are refused."""
    model = lite.setup(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(OrderError, match="This Linear is submodule '0' of a Sequential that was set up already"):
        lite.setup(model[0])
    other = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(SettingError, match="One object was passed twice among SGD, SGD"):
        lite.setup(other, optimizer, optimizer)
    loader = torch.utils.data.DataLoader([1])
    with pytest.raises(SettingError, match="passed twice"):
        lite.setup_dataloaders(loader, loader)


def test_optimizers_come_after_their_module(lite: Lite) -> None:
    """Optimizers are set up after a module; clipping requires a module's optimizer, of the same ``Lite``."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(OrderError, match=r"setup_optimizers\(\) before any model was set up"):
        lite.setup_optimizers(optimizer)
    lite.setup_module(model)
    assert lite.setup_optimizers(optimizer) is optimizer
    other = lite.setup(nn.Linear(2, 2))
    with pytest.raises(SettingError, match="this SGD holds no parameter of this Linear"):
        lite.clip_gradients(other, optimizer, max_norm=1.0)
    with Lite(accelerator="cpu", devices=1) as another:
        with pytest.raises(OrderError, match="this Linear was set up by another one"):
            another.clip_gradients(model, optimizer, max_norm=1.0)
        with pytest.raises(OrderError, match="this Linear was set up by another one"):
            another.no_backward_sync(model)


def test_objects_are_freed_at_once(lite: Lite) -> None:
    """Set-up makes no reference cycles: a model and its optimizer are freed with their last reference."""
    model = nn.Linear(4, 2)
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    lite.backward(model(torch.ones(1, 4)).sum())
    optimizer.step()
    references = [weakref.ref(model), weakref.ref(optimizer)]
    gc.disable()
    try:
        del model, optimizer
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


class Plain(torch.optim.Optimizer):
    """An optimizer whose step takes no arguments."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self) -> str:  # type: ignore[override]
        return "done"


class Greedy(torch.optim.SGD):
    """An optimizer whose step takes the loss as first argument."""

    def step(self, loss: float, closure: Any = None, *, boost: int = 1) -> Any:  # type: ignore[override]
        self.seen = (loss, boost)
        return super().step(closure)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_steps_have_the_users_signature(precision: str) -> None:
    """A step with any signature gets its arguments, also with schedulers and after tear-down."""
    model = nn.Linear(4, 2)
    plain, greedy = Plain(model.parameters()), Greedy(model.parameters(), lr=0.1)
    with Lite(accelerator="cpu", devices=1, precision=precision) as lite:
        lite.setup(model, plain, greedy)
        scheduler = torch.optim.lr_scheduler.StepLR(plain, 1)
        lite.backward(1e-6 * model(torch.ones(1, 4)).sum())
        assert plain.step() == "done"
        scheduler.step()
        greedy.step(3.0, boost=2)
        assert greedy.seen == (3.0, 2)
        greedy.step(loss=4.0)
        assert greedy.seen == (4.0, 1)
        with pytest.raises(TypeError, match="too many positional arguments"):
            greedy.step(1.0, None, 3)
        assert plain.optimizer is plain
    assert plain.step() == "done"
    scheduler.step()


def test_a_compiled_module_is_one_with_what_it_was_made_of(lite: Lite) -> None:
    """Methods and state of a compiled module are those of the original, and both accept the same calls."""
    x = torch.ones(1, 4)
    plain = Net()
    model = torch.compile(plain, backend="eager")
    with Lite(accelerator="cpu", devices=1, precision="bf16-true") as half:
        half.setup(model, forward_methods=("loss",))
        assert model.loss(x).dtype is torch.float32
        assert plain.loss(x).dtype is torch.float32
        assert model(x).dtype is torch.float32
        with pytest.raises(OrderError, match="set up already|that was set up"):
            half.setup(plain)
    assert type(plain) is Net
    unmarked = lite.setup(torch.compile(Net(), backend="eager"))
    unmarked.mark_forward_method("loss")
    assert unmarked.loss(x).ndim == 0
    assert torch.equal(copy.deepcopy(unmarked)(x), unmarked(x))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_set_up_module_compiles_as_one_graph(precision: str) -> None:
    """``torch.compile(model, fullgraph=True)`` works after set-up."""
    torch.compiler.reset()
    with Lite(accelerator="cpu", devices=1, precision=precision) as lite:
        model = lite.setup(Net(), forward_methods=("loss",))
        for call in (model, model.loss):
            result = torch.compile(call, backend="eager", fullgraph=True)(torch.ones(2, 4))
            lite.backward(result.mean())
            assert result.dtype is torch.float32
