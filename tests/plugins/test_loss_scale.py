"""Under a loss scaler a script sees gradients true to size, whatever it does with them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plugframe import Lite
from plugframe.errors import OrderError, PlugframeWarning
from plugframe_builtins.precisions import MixedPrecision


@pytest.fixture
def lite() -> Iterator[Lite]:
    """Yield one rank under a loss scale of 1024, at which nothing here overflows."""
    with job() as lite:
        yield lite


@contextmanager
def job(scale: float = 1024.0, **scaler: Any) -> Iterator[Lite]:
    precision = MixedPrecision("float16", scaler=torch.amp.GradScaler("cpu", init_scale=scale, **scaler))
    with Lite(accelerator="cpu", devices=1, precision=precision) as lite:
        yield lite


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def loss_of(module: nn.Module, number: int = 0) -> Tensor:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
    return (module(x) - x.sum(1, keepdim=True)).square().mean()


def close(got: Any, want: Any) -> None:
    """Compare within what float16 arithmetic loses."""
    torch.testing.assert_close(got, want, rtol=0.02, atol=2e-3)


def clip_by_hand(lite: Lite, module: Any, optimizer: Any) -> None:
    nn.utils.clip_grad_norm_(module.parameters(), 0.5)
    nn.utils.clip_grad_value_(module.parameters(), 0.05)


def scale_by_hand(lite: Lite, module: Any, optimizer: Any) -> None:
    for parameter in module.parameters():
        parameter.grad = parameter.grad / 3


@pytest.mark.parametrize("change", [clip_by_hand, scale_by_hand])
def test_what_a_script_does_to_gradients_is_what_it_does_without_a_scaler(
    change: Callable[..., Any], lite: Lite
) -> None:
    """Clipped, scaled or replaced between backward and step, over accumulated micro-batches too."""
    plain = network()
    other = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    module, optimizer = network(), None
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module, optimizer = lite.setup(module, optimizer)
    for number in range(3):
        optimizer.zero_grad()
        other.zero_grad()
        for part in (0, 1):
            lite.backward(loss_of(module, 2 * number + part))
            loss_of(plain, 2 * number + part).backward()
            close([p.grad for p in module.parameters()], [p.grad for p in plain.parameters()])
        change(lite, module, optimizer)
        change(lite, plain, other)
        optimizer.step()
        other.step()
    close(list(module.parameters()), list(plain.parameters()))


def test_clipping_twice_in_one_step(lite: Lite) -> None:
    """Two calls of ``lite.clip_gradients`` see the gradients of one process, the second what the first has left."""
    plain, module = network(), network()
    module, optimizer = lite.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    lite.backward(loss_of(module))
    loss_of(plain).backward()
    for limit in (1.0, 0.1):
        got = lite.clip_gradients(module, optimizer, max_norm=limit)
        close(got, nn.utils.clip_grad_norm_(plain.parameters(), limit))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_leaves_a_step_out(make: Any, fused: bool) -> None:
    """Gradients that are not finite move nothing, the scale is halved, and the next step counts; fused too."""
    with job(2.0**20, growth_interval=1) as lite:
        module = network()
        module, optimizer = lite.setup(module, make(module.parameters(), lr=0.01, fused=fused))
        before = copy.deepcopy(list(module.parameters()))
        lite.backward(loss_of(module) * 1e4)
        assert not all(p.grad.isfinite().all() for p in module.parameters())
        optimizer.step()
        torch.testing.assert_close(list(module.parameters()), before, rtol=0, atol=0)
        optimizer.zero_grad()
        lite.backward(loss_of(module) * 1e-4)
        gradients = [p.grad.clone() for p in module.parameters()]
        optimizer.step()
        optimizer.step()
        assert not torch.equal(module[0].weight, before[0])
        close([p.grad for p in module.parameters()], gradients)
        assert lite._hooks.precision_state()["scale"] in (2.0**19, 2.0**20, 2.0**21)


def test_a_step_by_hand_and_an_optimizer_of_the_scripts_own(lite: Lite) -> None:
    """``p -= lr * p.grad`` and an optimizer that was not set up step on true gradients."""
    plain, module = network(), lite.setup(network())
    stranger = torch.optim.SGD(module.parameters(), lr=0.1)
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    for number in range(4):
        for each, backward in ((module, lite.backward), (plain, torch.autograd.backward)):
            each.zero_grad()
            backward(loss_of(each, number))
        if number % 2:
            with torch.no_grad():
                for parameter in (*module.parameters(), *plain.parameters()):
                    parameter -= 0.1 * parameter.grad
        else:
            stranger.step()
            other.step()
    close(list(module.parameters()), list(plain.parameters()))


def test_a_stranger_that_steps_on_an_overflow_is_found() -> None:
    """Nobody leaves that step out: the next backward says so, and what to do."""
    with job(2.0**20) as lite:
        module = lite.setup(network())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        lite.backward(loss_of(module) * 1e4)
        optimizer.step()
        with pytest.raises(
            OrderError,
            match=r"overflowed float16 at loss scale 1.04858e\+06, and an optimizer that was not set up .* lite.setup",
        ):
            lite.backward(loss_of(module))


def test_a_stranger_is_found_beside_new_modules() -> None:
    """Also in a loop that creates modules, after which the parameters of all have to be looked up again."""
    with job(2.0**20) as lite:
        module = lite.setup(network())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        lite.backward(loss_of(module) * 1e4)
        optimizer.step()
        nn.Linear(1, 1)
        with pytest.raises(OrderError, match="overflowed float16 at loss scale"):
            lite.backward(loss_of(module))


def test_every_leaf_has_its_true_gradient(lite: Lite) -> None:
    """Inputs (an adversarial example), weights of a loss outside of the model, and parameters of a second model."""
    module, plain = network(), network()
    module, _ = lite.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    x = torch.randn(6, 4)
    for number in range(9):
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        weights = [torch.tensor(0.5, requires_grad=True) for _ in range(2)]
        for _ in range(2):
            lite.backward(weights[0].exp() * module(2 * mine).square().mean())
            (weights[1].exp() * plain(2 * theirs).square().mean()).backward()
        if number in (0, 1, 8):
            close(mine.grad, theirs.grad)
            close(weights[0].grad, weights[1].grad)
        module.zero_grad()
        plain.zero_grad()


def test_hooks_of_the_script_see_true_gradients(lite: Lite) -> None:
    """A tensor hook that clamps, and one after the accumulation, before set-up and after it."""
    for early in (True, False):
        plain, module = network(), network()
        seen: list[float] = []

        def hook(each: nn.Sequential, seen: list[float] = seen) -> None:
            each[0].weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
            each[2].weight.register_post_accumulate_grad_hook(lambda q: seen.append(float(q.grad.norm())))

        if early:
            hook(module)
        module, _ = lite.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        if not early:
            lite.backward(loss_of(module))
            module.zero_grad()
            hook(module)
        hook(plain)
        for _ in range(2):
            lite.backward(loss_of(module))
            loss_of(plain).backward()
        close([p.grad for p in module.parameters()], [p.grad for p in plain.parameters()])
        close(torch.tensor(seen[::2]), torch.tensor(seen[1::2]))


def test_two_models_and_optimizers_keep_their_gradients(lite: Lite) -> None:
    """What one model accumulates stays true while the other steps, and the scale grows."""
    with job(1024.0, growth_interval=1) as lite:
        pairs = []
        for _ in range(2):
            module = network()
            pairs.append(lite.setup(module, torch.optim.SGD(module.parameters(), lr=0.1)))
        (one, first), (two, second) = pairs
        plain = network()
        for number in range(3):
            lite.backward(loss_of(one, number))
            loss_of(plain, number).backward()
            second.zero_grad()
            lite.backward(loss_of(two, number))
            second.step()
        close([p.grad for p in one.parameters()], [p.grad for p in plain.parameters()])
        first.step()


def test_complex_sparse_and_empty_parameters_train(lite: Lite) -> None:
    """Odd parameters are scaled as others are."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.wave = nn.Parameter(torch.randn(4, dtype=torch.complex64))
            self.table = nn.Embedding(5, 4, sparse=True)
            self.nothing = nn.Parameter(torch.zeros(0, 4))

        def forward(self, rows: Tensor) -> Tensor:
            return (self.table(rows) * self.wave.abs()).square().mean() + self.nothing.sum()

    plain, module = Odd(), Odd()
    module, optimizer = lite.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    rows = torch.tensor([1, 3, 3])
    for _ in range(2):
        optimizer.zero_grad()
        other.zero_grad()
        lite.backward(module(rows))
        plain(rows).backward()
        optimizer.step()
        other.step()
    close(list(module.parameters()), list(plain.parameters()))


def test_a_scaler_and_an_autocast_of_the_scripts_own(lite: Lite) -> None:
    """A script that keeps its GradScaler and its autocast takes the steps it takes without plugframe, with warnings."""
    plain, module = network(), network()
    module, optimizer = lite.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(number: int) -> None:
        optimizer.zero_grad()
        other.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(lambda x: module(x).float(), number)  # type: ignore[arg-type]
        lite.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
        loss_of(plain, number).backward()
        other.step()

    with (
        pytest.warns(PlugframeWarning, match="under the script's torch.autocast"),
        pytest.warns(PlugframeWarning, match="The script's GradScaler steps an optimizer"),
    ):
        step(0)
    step(1)
    step(2)
    close(list(module.parameters()), list(plain.parameters()))


def test_a_scaler_that_is_switched_off_scales_nothing() -> None:
    """``GradScaler(enabled=False)`` is no loss scale at all: a closure works, and nothing is skipped."""
    precision = MixedPrecision("bfloat16", scaler=torch.amp.GradScaler("cpu", enabled=False))
    with Lite(accelerator="cpu", devices=1, precision=precision) as lite, warnings.catch_warnings():
        module = network()
        module, optimizer = lite.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(module)
            lite.backward(loss)
            return loss

        assert optimizer.step(closure).isfinite()
