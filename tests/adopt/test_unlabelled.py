"""A step, ``zero_grad`` and a loader do what torch's own do: at less cost, and in full where somebody looks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from plugframe import Lite
from plugframe.utils import unlabelled
from plugframe.utils.unlabelled import iterator_without_label, without_label, zero_grad_without_label


class Signed(torch.optim.Optimizer):
    """A user's own optimizer."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert not torch.is_grad_enabled()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])
        return None if closure is None else closure()


MAKERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1),
    "own": Signed,
}


@pytest.fixture
def lite() -> Iterator[Lite]:
    with Lite(accelerator="cpu", devices=1) as lite:
        yield lite


def model() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(3, 2)


def trained(module: nn.Module, optimizer: Any, backward: Any, *, set_to_none: bool = True) -> list[torch.Tensor]:
    """Return the parameters after three steps, with gradients that are not None before each."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))

    def closure() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = module(x).square().mean()
        backward(loss)
        return loss

    for _ in range(3):
        closure()
        optimizer.step(*([closure] if isinstance(optimizer, torch.optim.LBFGS) else []))
        assert torch.is_grad_enabled()
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("name", MAKERS)
def test_steps_are_torchs_bit_for_bit(lite: Lite, name: str) -> None:
    """Of torch's optimizers and a user's own, with gradients set to None and to zero."""
    for set_to_none in (True, False):
        mine, theirs = model(), model()
        module, optimizer = lite.setup(mine, MAKERS[name](mine.parameters()))
        found = trained(module, optimizer, lite.backward, set_to_none=set_to_none)
        expected = trained(theirs, MAKERS[name](theirs.parameters()), torch.Tensor.backward, set_to_none=set_to_none)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in module.parameters())


def test_hooks_of_a_step_run(lite: Lite) -> None:
    """Those of the optimizer and of all optimizers, registered after set-up, and no longer once they are removed."""
    module = model()
    module, optimizer = lite.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    seen: list[str] = []
    trained(module, optimizer, lite.backward)
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
        register_optimizer_step_pre_hook(lambda *_: seen.append("any")),
    ]
    optimizer.step()
    assert seen == ["any", "before", "after"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(seen) == 3


def test_a_profiler_sees_torchs_labels(lite: Lite) -> None:
    """One that starts after set-up and some steps, in the middle of a pass: step, zero_grad and the loader."""
    module = model()
    module, optimizer = lite.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    batches = iter(lite.setup_dataloaders(DataLoader(TensorDataset(torch.randn(4, 3)), batch_size=2)))
    next(batches)
    trained(module, optimizer, lite.backward)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        next(batches)
        optimizer.step()
        optimizer.zero_grad()
    names = {event.name for event in found.events() or ()}
    assert {"Optimizer.step#SGD.step", "Optimizer.zero_grad#SGD.zero_grad"} <= names
    assert "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__" in names


def test_a_pass_is_torchs() -> None:
    """Same batches, attributes and count; a stream keeps torch's iterator, which compares its length."""
    loader = DataLoader(TensorDataset(torch.arange(5.0)), batch_size=2)
    quick: Any = iterator_without_label(iter(loader))
    assert [batch.tolist() for (batch,) in quick] == [batch.tolist() for (batch,) in loader]
    assert (quick._num_yielded, quick._num_workers) == (3, 0)
    with pytest.raises(StopIteration):
        next(quick)

    class Stream(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    stream = iter(DataLoader(Stream()))
    assert iterator_without_label(stream) is stream
    assert iterator_without_label(batches := iter([1])) is batches


def test_what_is_not_torchs_as_known_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of the user's, or of a torch that does something else there, is returned as it is."""

    class Own(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none)

    def step(self: Any) -> None: ...

    assert without_label(step, "Own") is step
    assert zero_grad_without_label(Own.zero_grad, "Own") is Own.zero_grad
    Own(model().parameters())
    assert without_label(Own.step, "Own") is not Own.step
    monkeypatch.setattr(unlabelled, "_STEP_NAMES", "something_else")
    monkeypatch.setattr(unlabelled, "_NEXT_NAMES", "something_else")
    assert without_label(Own.step, "Own") is Own.step
    batches = iter(DataLoader(TensorDataset(torch.arange(5.0))))
    assert iterator_without_label(batches) is batches


def test_this_torch_is_known() -> None:
    """The functions of the installed torch are those that the module knows: else a step costs 30 µs more."""
    optimizer = torch.optim.SGD(model().parameters())
    step = without_label(type(optimizer).step, "SGD")
    assert step is not type(optimizer).step
    batches = iter(DataLoader(TensorDataset(torch.arange(5.0))))
    assert iterator_without_label(batches) is not batches


def test_a_module_on_one_rank_is_called_directly_after_its_first_call(lite: Lite) -> None:
    """Its class's own ``__call__`` and ``forward`` run, also if another class was derived from the adopted one."""
    module = lite.setup(model())
    with pytest.MonkeyPatch.context() as patch:
        calls: list[str] = []
        patch.setattr(nn.Linear, "__call__", lambda self, x: calls.append("called"), raising=False)
        module = lite.setup(model())
        assert type(module).__call__ is not nn.Linear.__call__
        for _ in range(2):
            module(torch.ones(1, 3))
        assert calls == ["called"] * 2
        assert type(module).__call__ is nn.Linear.__call__
        assert type(module).forward is nn.Linear.forward
    parametrized = lite.setup(model())
    nn.utils.parametrizations.weight_norm(parametrized)
    expected = parametrized(torch.ones(1, 3))
    assert type(parametrized).__call__ is nn.Module.__call__
    assert torch.equal(parametrized(torch.ones(1, 3)), expected)
