"""Accumulated gradients are those of one process on all micro-batches; calls in the middle of a step are refused."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from plugframe import Lite, OrderError, PlugframeWarning, SettingError
from plugframe.hooks.world import World
from ranks import run_checks

STRATEGIES = ("ddp", "fsdp", "tensor_parallel", "pipeline", "deepspeed_stage_2", "deepspeed_stage_3")
MODES = ("mean", "weighted", "counted")


@contextmanager
def ranks(world: World) -> Iterator[World]:
    yield world


def plain() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    model.tensor_parallel_plan, model.pipeline_plan = {"0": "colwise", "2": "rowwise"}, [["0", "1"], ["2"]]
    return model


@contextmanager
def job(world: World | None, strategy: str = "single") -> Iterator[tuple[Any, Any, Any]]:
    devices = world.world_size if world else 1
    with Lite(accelerator="cpu", strategy=strategy, devices=devices) as lite:
        lite.launch()
        yield lite, *set_up(lite)


def set_up(lite: Any) -> tuple[Any, Any]:
    model = plain()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.5))
    return model, optimizer


def data(number: int, size: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(number, 4, generator=generator), torch.randn(number, 1, generator=generator)
    weights = torch.randint(0, 4, (number, 1), generator=generator).float()
    return DataLoader(TensorDataset(x, y, weights), batch_size=size)


def loss_of(out: Tensor, y: Tensor, w: Tensor, mode: str) -> Tensor:
    error = (out - y).square()
    return error.mean() if mode == "mean" else (error * w).sum() / w.sum().clamp(min=1e-6)


def trained(lite: Any, model: Any, optimizer: Any, mode: str, *, size: int) -> dict[str, Any]:
    """Train an epoch of 3 and 2 micro-batches; return the weights."""
    loader = lite.setup_dataloaders(data(20, size))
    count: Any = (lambda batch: batch[2].sum()) if mode == "counted" else None
    steps = 0
    for x, y, w in lite.accumulate(loader, steps=3, weight=count):
        loss = loss_of(model(x), y, w, mode)
        lite.backward(loss, weight=w.sum() if mode == "weighted" else None)
        if not lite.accumulating:
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    assert steps == 2
    return dict(lite.state_dict(model, all_ranks=True))


@functools.cache
def expected(mode: str) -> dict[str, Tensor]:
    """Return the weights that plain torch computes on the complete batches."""
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = list(data(20, 4))
    for window in (batches[:3], batches[3:]):
        total = sum(float(w.sum()) for _, _, w in window)
        for x, y, w in window:
            factor = 1 / len(window) if mode == "mean" else float(w.sum()) / total
            (loss_of(model(x), y, w, mode) * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_one_rank_accumulates_as_plain_torch(mode: str) -> None:
    """The real number of micro-batches divides the losses at the end of an epoch; tokens of all of them count."""
    with job(None) as (lite, model, optimizer):
        found = trained(lite, model, optimizer, mode, size=4)
    for name, value in expected(mode).items():
        torch.testing.assert_close(found[name], value)


def every_strategy_accumulates_as_one_process(world: World) -> None:
    """Means, weights given to backward, and weights counted before, in every strategy."""
    for strategy in STRATEGIES:
        size = 4 if strategy in ("tensor_parallel", "pipeline") else 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlugframeWarning)
            with Lite(accelerator="cpu", strategy=strategy, devices=world.world_size) as lite:
                lite.launch()
                for mode in MODES:
                    found = trained(lite, *set_up(lite), mode, size=size)
                    for name, value in expected(mode).items():
                        torch.testing.assert_close(found[name], value, msg=f"{strategy}, {mode}: {name}")


def gradients_are_synchronised_once(world: World) -> None:
    """The gradients of the micro-batches before the last are each rank's own."""
    with job(world, "ddp") as (lite, model, optimizer):
        differ = []
        for x, y, w in lite.accumulate(lite.setup_dataloaders(data(16, 2)), steps=2):
            lite.backward(loss_of(model(x), y, w, "mean"))
            everyone = lite.all_gather(model[0].weight.grad)
            differ.append(not torch.equal(everyone[0], everyone[1]))
            if not lite.accumulating:
                optimizer.step()
                optimizer.zero_grad()
        assert differ == [True, False, True, False]


CHECKS = [every_strategy_accumulates_as_one_process, gradients_are_synchronised_once]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return run_checks(2, ranks, CHECKS, timeout_s=300)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_accumulation_on_two_ranks(check: Callable[..., None], results: dict[str, str]) -> None:
    assert not results[check.__name__], results[check.__name__]


def run_loop(body: Callable[..., Any], *, steps: int = 2, number: int = 8, loader: Any = None) -> None:
    with job(None) as (lite, model, optimizer):
        batches = loader if loader is not None else lite.setup_dataloaders(data(number, 2))
        for x, _, _ in lite.accumulate(batches, model, steps=steps):
            body(lite, model, optimizer, x)


def step_each_time(lite: Any, model: Any, optimizer: Any, x: Tensor) -> None:
    lite.backward(model(x).mean())
    optimizer.step()


def reset_each_time(lite: Any, model: Any, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad()
    lite.backward(model(x).mean())


def clip_each_time(lite: Any, model: Any, optimizer: Any, x: Tensor) -> None:
    lite.backward(model(x).mean())
    lite.clip_gradients(model, optimizer, max_norm=1.0)


def never_step(lite: Any, model: Any, optimizer: Any, x: Tensor) -> None:
    lite.backward(model(x).mean())


def leave_out_the_last(lite: Any, model: Any, optimizer: Any, x: Tensor) -> None:
    if lite.accumulating:
        lite.backward(model(x).mean())
    else:
        optimizer.step()


def weigh_some(lite: Any, model: Any, optimizer: Any, x: Tensor) -> None:
    lite.backward(model(x).mean(), weight=2 if lite.accumulating else None)


def weigh_twice(lite: Any, model: Any, optimizer: Any, x: Tensor) -> None:
    lite.backward(model(x).mean(), weight=2)
    lite.backward(model(x).mean(), weight=2)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (step_each_time, "SGD.step.. is called at micro-batch 1 of 2 .*under `if not lite.accumulating"),
        (reset_each_time, "SGD.zero_grad.. at micro-batch 2 of 3 .* drops the gradients"),
        (clip_each_time, "lite.clip_gradients.. is called at micro-batch 1 of 2"),
        (never_step, "No optimizer stepped after the last micro-batch"),
        (leave_out_the_last, "micro-batch 2 of 2 .* the last one, had no lite.backward"),
        (weigh_some, "pass a weight for every micro-batch"),
        (weigh_twice, "called twice for a micro-batch"),
    ],
)
def test_calls_in_the_middle_of_a_step_are_refused(body: Callable[..., Any], match: str) -> None:
    """A loop that steps, clips or resets at every micro-batch, or never steps, raises at the call."""
    with pytest.raises(OrderError, match=match):
        run_loop(body, steps=3 if body is reset_each_time else 2)


def test_a_loop_that_is_left_early_cannot_step() -> None:
    """After a break in the middle of a step its gradients can be dropped, and not be used."""
    with job(None) as (lite, model, optimizer):
        loader = lite.setup_dataloaders(data(8, 2))
        for x, _, _ in lite.accumulate(loader, steps=2):
            lite.backward(model(x).mean())
            break
        assert not lite.accumulating
        with pytest.raises(OrderError, match="the loop ended at micro-batch 1 of 2"):
            optimizer.step()
        with pytest.raises(OrderError, match="No optimizer stepped"):
            next(iter(lite.accumulate(loader, steps=2)))
        optimizer.zero_grad()
        lite.backward(model(x).mean())
        optimizer.step()


def test_a_loss_divided_by_the_script_too_is_warned_of() -> None:
    """One warning points out that the division happens twice."""

    def body(lite: Any, model: Any, optimizer: Any, x: Tensor) -> None:
        lite.backward(model(x).mean() / 2)
        if not lite.accumulating:
            optimizer.step()
            optimizer.zero_grad()

    with pytest.warns(PlugframeWarning, match="divided by 2") as caught:
        run_loop(body)
    assert len(caught) == 1


def test_saving_in_the_middle_of_a_step_is_warned_of(tmp_path: Any) -> None:
    """The gradients of a step are in no checkpoint; between steps nothing is lost."""

    def body(lite: Any, model: Any, optimizer: Any, x: Tensor) -> None:
        lite.backward(model(x).mean())
        if not lite.accumulating:
            optimizer.step()
            optimizer.zero_grad()
        with pytest.warns(PlugframeWarning, match="middle of") if lite.accumulating else warnings.catch_warnings():
            lite.save(tmp_path / "a", {"model": model})

    run_loop(body)


def test_other_models_step_at_every_micro_batch() -> None:
    """A model that is not accumulated trains as usual, if the loop says whose loss it is."""
    with job(None) as (lite, model, optimizer):
        other = nn.Linear(4, 1)
        other, own = lite.setup(other, torch.optim.SGD(other.parameters(), lr=0.1))
        loader = lite.setup_dataloaders(data(8, 2))
        for x, _, _ in lite.accumulate(loader, model, steps=2):
            with pytest.raises(OrderError, match="Say whose loss"):
                lite.backward(other(x).mean())
            own.zero_grad()
            lite.backward(other(x).mean(), model=other)
            assert other.bias.grad.item() == 1.0
            own.step()
            lite.backward(model(x).mean(), model=model)
            if not lite.accumulating:
                optimizer.step()
                optimizer.zero_grad()


def test_wrong_arguments_are_refused() -> None:
    """Numbers of steps, weights and plain iterables."""
    with job(None) as (lite, model, optimizer):
        for steps in (0, 1.5, True):
            with pytest.raises(SettingError, match="number of micro-batches"):
                lite.accumulate([], model, steps=steps)
        with pytest.raises(OrderError, match="was not"):
            lite.accumulate([], nn.Linear(1, 1), steps=2)
        for seen, x in enumerate(lite.accumulate([torch.ones(2, 4)] * 3, model, steps=2), 1):
            lite.backward(model(x).mean())
            assert lite.accumulating == (seen == 1)
            if not lite.accumulating:
                optimizer.step()
                optimizer.zero_grad()
        with pytest.raises(SettingError, match="pass one"):
            lite.backward(model(torch.ones(1, 4)).mean(), weight=1, reduction="sum")
        with pytest.raises(SettingError, match="no mean"):
            lite.backward(model(torch.ones(1, 4)).mean(), weight=0)
