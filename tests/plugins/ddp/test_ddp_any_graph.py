"""Under ddp gradients are those of one process on the whole batch, whatever graph they come from."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plugframe import Lite
from plugframe.errors import OutOfSyncError, UnsupportedError
from plugframe.hooks.world import World
from plugframe_builtins.ddp.strategy import DDP
from ranks import run_checks

Backward = Callable[..., None]


@contextmanager
def job(world: World) -> Iterator[Lite]:
    with Lite(accelerator="cpu", devices=world.world_size, strategy="ddp") as lite:
        yield lite


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def whole(lite: Lite, seed: int = 3) -> Tensor:
    return torch.randn(lite.world_size * 3, 4, generator=torch.Generator().manual_seed(seed))


def same(lite: Lite, model: nn.Module, plain: nn.Module) -> None:
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(
                mine.grad.to_dense(), theirs.grad.to_dense(), msg=lambda text, name=name: f"{name}: {text}"
            )


def both(lite: Lite, make: Callable[[], nn.Module], step: Callable[[nn.Module, Tensor, Backward], None]) -> None:
    """Run `step` on this rank's rows under `lite`, and on all rows in plain torch: the gradients are equal."""
    plain = make()
    model = lite.setup(make())
    x = whole(lite)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
        for _ in range(2):
            step(model, x[lite.global_rank :: lite.world_size].clone(), lite.backward)
            step(plain, x.clone(), torch.autograd.backward)
            same(lite, model, plain)
    model.zero_grad()


def frozen_in_between(model: nn.Module, x: Tensor, backward: Backward) -> None:
    first = model(x)
    model.requires_grad_(False)
    backward(model(x.clone().requires_grad_()).mean())
    model.requires_grad_(True)
    backward(first.square().mean())


def partly_frozen(model: Any, x: Tensor, backward: Backward) -> None:
    first = model(x)
    model[0].requires_grad_(False)
    backward(first.square().mean())
    backward(model(x).mean())
    model[0].requires_grad_(True)
    model.zero_grad()
    backward(model(x).mean())


def forward_twice(model: nn.Module, x: Tensor, backward: Backward) -> None:
    one, two = model(x), model(2 * x)
    backward(one.mean(), retain_graph=True)
    backward(one.square().mean() - two.mean())


def penalty(model: nn.Module, x: Tensor, backward: Backward) -> None:
    x.requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    backward((slope.norm(dim=1) - 1).square().mean())
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    backward(slope.square().sum(1).mean() + model(x).mean())


def second_derivatives(model: nn.Module, x: Tensor, backward: Backward) -> None:
    model.zero_grad()
    backward(model(x).square().mean(), create_graph=True)
    penalty = sum(p.grad.square().sum() for p in model.parameters())
    backward(penalty)
    for parameter in model.parameters():
        parameter.grad = parameter.grad.detach()


def terms_outside_of_forward(model: Any, x: Tensor, backward: Backward) -> None:
    backward(model(x).mean() + sum(p.square().sum() for p in model.parameters()))
    backward(model[2].weight.abs().sum())
    model.zero_grad()
    backward(0.1 * sum(p.square().sum() for p in model.parameters()))
    backward(model(x).mean())


def reentrant(model: Any, x: Tensor, backward: Backward) -> None:
    x.requires_grad_()
    hidden = checkpoint(model[0], x, use_reentrant=True)
    hidden = checkpoint(lambda h: model[0](model[0](x) @ torch.ones(6, 4) / 9), hidden, use_reentrant=True) + hidden
    backward(model[2](hidden).square().mean())


STEPS = [
    frozen_in_between,
    partly_frozen,
    forward_twice,
    penalty,
    second_derivatives,
    terms_outside_of_forward,
    reentrant,
]


def any_graph(lite: Lite) -> None:
    """Frozen in between, several forwards and backwards, penalties, second derivatives, terms without a forward."""
    for step in STEPS:
        both(lite, network, step)


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4096), nn.Tanh(), nn.Linear(4096, 1)).double()


def large_gradients(lite: Lite) -> None:
    """Gradients that are scaled while they are copied: first and second derivatives, frozen in between."""
    for step in (frozen_in_between, forward_twice, second_derivatives):
        both(lite, wide, lambda model, x, backward, step=step: step(model, x.double(), backward))


def reentrant_on_one_rank(lite: Lite) -> None:
    """A rank whose backward adds to a gradient in several parts, where the others' add once."""

    def step(model: Any, x: Tensor, backward: Backward) -> None:
        x.requires_grad_()
        halves = x[: len(x) // 2], x[len(x) // 2 :]
        hidden = model[0](x)
        if lite.global_rank == 1 or backward is not lite.backward:  # the same numbers either way
            hidden = torch.cat([checkpoint(model[0], half, use_reentrant=True) for half in halves])
        backward(model[2](hidden).square().mean())

    both(lite, network, step)


def repeated_gradients_that_come_late(lite: Lite) -> None:
    """A backward that adds to a gradient after it was sent, as none before did, is refused by the parameter's name."""
    model: Any = lite.setup(network())
    x = whole(lite).requires_grad_()
    lite.backward(model(x).mean())
    hidden = checkpoint(model[0], x, use_reentrant=True)
    hidden = checkpoint(lambda h: model[0](x) + h, hidden, use_reentrant=True)
    with pytest.raises(UnsupportedError, match=r"parameter '0.(weight|bias)' twice, .* use_reentrant=False"):
        lite.backward(model[2](hidden).square().mean())


def raw_backward(lite: Lite) -> None:
    """``loss.backward()`` averages too, and torch.compile'd models do."""
    both(lite, network, lambda model, x, _: torch.autograd.backward(model(x).square().mean()))
    both(lite, lambda: torch.compile(network(), backend="aot_eager"), frozen_in_between)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wave = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.nothing = nn.Parameter(torch.zeros(0, 4))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.table = nn.Embedding(8, 4, sparse=True)
        self.image = nn.Conv2d(1, 2, 2)
        self.image.weight.data = self.image.weight.data.contiguous(memory_format=torch.channels_last)
        self.register_buffer("mask", torch.ones(1, 4).expand(3, 4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        rows = self.table((x[:, 0].abs() * 3).long().clamp(max=7))
        x = x * self.scalar + rows * self.wave.abs() * self.mask[0]
        return self.image(x.view(-1, 1, 2, 2)).square().mean() + self.nothing.sum()


def odd_tensors(lite: Lite) -> None:
    """Complex, empty, 0-d, sparse, channels_last parameters and expanded buffers; evaluation comes first."""
    plain, model = Odd(), Odd()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    x = whole(lite)
    with torch.inference_mode():
        model(x)
    for _ in range(2):
        for each, by, rows, backward in (
            (model, optimizer, x[lite.global_rank :: lite.world_size], lite.backward),
            (plain, other, x, torch.autograd.backward),
        ):
            by.zero_grad()
            backward(each(rows))
        assert model.table.weight.grad.is_sparse
        same(lite, model, plain)
        optimizer.step()
        other.step()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def functional_sparse_gradients_are_refused(lite: Lite) -> None:
    """A sparse gradient where no layer announces one is refused by the name of the parameter, on all ranks."""
    model = nn.Module()
    model.table = nn.Parameter(torch.ones(4, 2))
    model.forward = lambda x: nn.functional.embedding(x, model.table, sparse=True).sum()
    model = lite.setup(model)
    with pytest.raises(UnsupportedError, match="Parameter 'table' got a sparse gradient"):
        lite.backward(model(torch.tensor([1])))


def layers_that_come_later(lite: Lite) -> None:
    """A replaced head, an added parameter and a wrapped block are equal on all ranks and averaged."""
    model: Any = lite.setup(network())
    x = whole(lite)[lite.global_rank :: lite.world_size]
    torch.manual_seed(10 + lite.global_rank)
    model[2] = nn.Linear(6, 1)
    model[0] = nn.Sequential(model[0], nn.BatchNorm1d(6))
    model[1].scale = nn.Parameter(torch.rand(1))
    optimizer = lite.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        lite.backward((model(x) * model[1].scale).square().mean())
        optimizer.step()
    lite.assert_in_sync(model, optimizer)


def gradients_by_hand(lite: Lite) -> None:
    """Gradients that a script clips, scales, replaces or zeroes, with accumulation, are one process's."""
    plain, model = network(), lite.setup(network())
    x = whole(lite)
    for number in range(4):
        with lite.no_backward_sync(model, enabled=number % 2 == 0):
            lite.backward(model(x[lite.global_rank :: lite.world_size]).square().mean())
        plain(x).square().mean().backward()
        if number % 2:
            for each in (model, plain):
                nn.utils.clip_grad_norm_(each.parameters(), 0.1)
                each[0].weight.grad = each[0].weight.grad * 2
                each[2].bias.grad.zero_()
                each[2].weight.grad = None
    same(lite, model, plain)


def two_models_at_once(lite: Lite) -> None:
    """A generator and a discriminator, whose backwards go through both, or one of them frozen."""
    ours = [lite.setup(nn.Linear(4, 4)), lite.setup(network(1))]
    plain = [copy.deepcopy(each) for each in ours]
    x = whole(lite)
    for (g, d), rows, backward in (
        (ours, x[lite.global_rank :: lite.world_size], lite.backward),
        (plain, x, torch.autograd.backward),
    ):
        fake = g(rows)
        real = d(rows)
        backward(real.mean() - d(fake.detach()).mean())
        backward(d(fake).square().mean())
        d.requires_grad_(False)
        backward(d(g(rows)).mean())
        d.requires_grad_(True)
    for mine, theirs in zip(ours, plain, strict=True):
        same(lite, mine, theirs)


def line_searches_agree(lite: Lite) -> None:
    """LBFGS with a line search sees the loss of all ranks, and equals one process on the whole batch."""
    runs = []
    x = whole(lite)
    for model, rows, backward in (
        (network(), x[lite.global_rank :: lite.world_size], lite.backward),
        (network(), x, torch.autograd.backward),
    ):
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=8, line_search_fn="strong_wolfe")
        if backward == lite.backward:
            lite.setup(model, optimizer)

        def closure(model: Any = model, rows: Tensor = rows, backward: Any = backward, by: Any = optimizer) -> Tensor:
            by.zero_grad()
            loss = (model(rows) - rows.sum(1, keepdim=True).sin()).square().mean()
            backward(loss)
            return loss

        losses = [float(optimizer.step(closure).detach()) for _ in range(2)]
        runs.append((losses, list(model.parameters())))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-4)
    lite.assert_in_sync()


def deleted_models_are_not_compared(lite: Lite) -> None:
    """A model in a reference cycle stays until garbage is collected, which ranks do at different times."""
    gc.collect()
    gc.disable()
    try:
        model = lite.setup(network())
        model.cycle = [model]
        del model
        if lite.global_rank:
            gc.collect()
        lite.assert_in_sync()
    finally:
        gc.enable()


def learning_rates_of_a_rank_are_named(lite: Lite) -> None:
    """A rank whose learning rate or momentum goes its own way is found at the next step, on all ranks, by name."""
    for key, value in (("lr", 0.5), ("momentum", 0.3)):
        model = network()
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.1))
        for number in range(2):
            lite.backward(model(torch.ones(2, 4)).sum())
            if number == 1 and lite.global_rank == 1:
                optimizer.param_groups[0][key] = value
            optimizer.step()
        with pytest.raises(OutOfSyncError, match=rf"'{key}' in parameter group 0 of SGD .*: 0.1 on rank 0, {value}"):
            lite.backward(model(torch.ones(2, 4)).sum())


def steps_that_a_rank_leaves_out_are_named(lite: Lite) -> None:
    """A rank that left a step out is found when it makes its next one."""
    model = network()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def train() -> None:
        for number in range(4):
            lite.backward(model(torch.ones(2, 4)).sum())
            if number != 1 or lite.global_rank == 0:
                optimizer.step()
            if number == 2 and lite.global_rank == 1:
                optimizer.step()

    with pytest.raises(OutOfSyncError, match="do not make the same steps of SGD: .* on rank 0, .* on rank 1"):
        train()


CHECKS = [
    any_graph,
    raw_backward,
    large_gradients,
    reentrant_on_one_rank,
    repeated_gradients_that_come_late,
    odd_tensors,
    functional_sparse_gradients_are_refused,
    layers_that_come_later,
    gradients_by_hand,
    two_models_at_once,
    line_searches_agree,
    deleted_models_are_not_compared,
    learning_rates_of_a_rank_are_named,
    steps_that_a_rank_leaves_out_are_named,
]


@contextmanager
def as_views(world: World) -> Iterator[Lite]:
    with Lite(accelerator="cpu", devices=2, strategy=DDP(gradient_as_bucket_view=True, bucket_cap_mb=1)) as lite:
        yield lite


def any_graph_with_views(lite: Lite) -> None:
    """The same where gradients are views of the buckets."""
    for step in STEPS[:3]:
        both(lite, network, step)


@pytest.fixture(scope="module")
def on_two_ranks() -> dict[str, str]:
    return {**run_checks(2, job, CHECKS), **run_checks(2, as_views, [any_graph_with_views])}


@pytest.mark.parametrize("check", [*CHECKS, any_graph_with_views], ids=lambda check: check.__name__)
def test_on_two_ranks(check: Callable[[Lite], None], on_two_ranks: dict[str, str]) -> None:
    """The rule in the check's docstring holds on both of two gloo ranks."""
    assert not on_two_ranks[check.__name__], on_two_ranks[check.__name__]
