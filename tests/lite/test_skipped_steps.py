"""An extension may skip an optimizer step, on all ranks, under every strategy; and request the end of the loop."""

from __future__ import annotations

import importlib.util
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from plugframe import Lite, PlugframeWarning, PluginContractError, hookimpl
from plugframe.adopt import adopt_optimizer, release_optimizer, state_of
from plugframe.base import Extension
from plugframe.hooks.world import World
from plugframe.utils.shards import local_of
from ranks import run_ranks


class Skips(Extension):
    """Skips the steps with the given numbers, on one rank; the others do not ask for it."""

    def __init__(self, *steps: int, rank: int = 0, stops_at: int = -1) -> None:
        self.steps, self.rank, self.stops_at = steps, rank, stops_at
        self.num_votes = self.num_steps = 0
        self.context: Any = None

    @hookimpl
    def on_launch(self, context: Any) -> None:
        self.context = context

    @hookimpl
    def skip_optimizer_step(self) -> bool:
        number, self.num_votes = self.num_votes, self.num_votes + 1
        mine = self.context.world.global_rank == self.rank
        if mine and number == self.stops_at:
            self.context.request_stop(f"step {number} is the last.")
        return mine and number in self.steps

    @hookimpl
    def on_optimizer_step(self) -> None:
        self.num_steps += 1


class Steps(Extension):
    """Counts the steps that are made."""

    num_steps = 0

    @hookimpl(wrapper=True)
    def strategy_optimizer_step(self) -> Any:
        self.num_steps += 1
        return (yield)


class Net(nn.Module):
    """Layers with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def gradients(lite: Lite, model: nn.Module) -> list[torch.Tensor]:
    """Return copies of the gradients, none under a strategy that keeps them elsewhere."""
    if "deepspeed" in lite.plan.choices["strategy"].name:
        return []
    return [local_of(parameter.grad).clone() for parameter in model.parameters() if parameter.grad is not None]


def train(lite: Lite, *, skip: tuple[int, ...] = (), num_steps: int = 5, **settings: Any) -> tuple[Any, Any]:
    """Train, without the steps in `skip` if no extension leaves them out; return the model and its weights."""
    model = Net()
    # Of the fused optimizers SGD with momentum starts from uninitialized memory under a loss scaler (torch 2.13).
    make: Any = torch.optim.AdamW if settings.get("fused") else torch.optim.SGD
    more: dict[str, Any] = {} if settings.get("fused") else {"momentum": 0.9}
    model, optimizer = lite.setup(model, make(model.parameters(), lr=0.1, **more, **settings))
    for step in range(num_steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + lite.global_rank))
        optimizer.zero_grad()
        lite.backward(model(x).square().mean())
        before = gradients(lite, model)
        if step not in skip:
            optimizer.step()
        if step in (1, 3):
            assert all(map(torch.equal, before, gradients(lite, model)))
    return model, lite.state_dict(model, all_ranks=True)


def job(*plugins: Any, **settings: Any) -> Lite:
    return Lite(**{"accelerator": "cpu", "devices": 1, "plugins": plugins, **settings})


def same(first: dict[str, Any], second: dict[str, Any]) -> None:
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_is_no_step(precision: str, fused: bool) -> None:
    """Weights and momentum are those of a loop that never called it; nobody is notified, and the counts go on."""
    skips, steps = Skips(1, 3), Steps()
    with job(skips, steps, precision=precision) as lite:
        _, weights = train(lite, fused=fused)
    with job(precision=precision) as lite:
        same(train(lite, skip=(1, 3), fused=fused)[1], weights)
    assert (skips.num_votes, skips.num_steps, steps.num_steps) == (5, 3, 3)


def test_without_the_hook_nothing_is_asked() -> None:
    """No function is bound: a step costs a look at an attribute."""
    with job(Steps()) as lite:
        model = Net()
        _, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        assert lite._hooks.skip_optimizer_step is None
        assert state_of(optimizer).skip is None


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scaler_learns_of_an_overflow_in_a_skipped_step(fused: bool) -> None:
    """The scale is halved as without the extension, so that the next gradients fit."""
    with job(Skips(0), precision="16-mixed") as lite:
        model = Net()
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, fused=fused))
        lite.backward(model(torch.ones(4, 4)).square().mean())
        for parameter in model.parameters():
            parameter.grad.fill_(float("inf"))  # type: ignore[union-attr]
        optimizer.step()
        assert lite._hooks.precision_state()["scale"] == 32768.0
        optimizer.zero_grad()
        lite.backward(model(torch.randn(4, 4)).square().mean())
        optimizer.step()
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_closure_of_a_skipped_step_does_not_run() -> None:
    """The step returns None, a scheduler's count and the gradients stay."""
    calls = []
    with job(Skips(0)) as lite:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        model, optimizer = lite.setup(model, optimizer)

        def closure() -> torch.Tensor:
            calls.append(1)
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().mean()
            lite.backward(loss)
            return loss

        assert optimizer.step(closure) is None
        assert not calls
        assert optimizer.step(closure) is not None
        scheduler.step()
        assert len(calls) == 1


class Replaces(Extension):
    """Makes half a step in place of the script's."""

    @hookimpl
    @torch.no_grad()
    def skip_optimizer_step(self, optimizer: torch.optim.Optimizer) -> bool:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"] / 2)
        return True


def test_an_extension_may_replace_a_step() -> None:
    """Its own update is the only one."""
    with job(Replaces()) as lite:
        _, halves = train(lite, num_steps=1)
    with job() as lite:
        model = Net()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        _, full = train(lite, num_steps=1)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(halves[name], (before[name] + full[name]) / 2, rtol=1e-6, atol=1e-7)
        assert parameter.shape == full[name].shape


def test_a_strategy_without_the_hook_skips_too() -> None:
    """One that was written before the hook, on no base class, gets a step that does nothing."""
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    hooks = SimpleNamespace(
        strategy_optimizer_step=lambda optimizer, step, closure: step(),
        strategy_skip_step=None,
        on_optimizer_step=None,
    )
    adopt_optimizer(optimizer, hooks=hooks, skip=lambda optimizer: True)
    optimizer.step()
    assert parameter.tolist() == [1, 1]
    release_optimizer(optimizer)


class Wraps(Extension):
    @hookimpl(wrapper=True)
    def strategy_skip_step(self) -> Any:
        return (yield)


def test_the_hook_of_the_strategy_cannot_be_wrapped() -> None:
    """A wrapper would never be called: it is refused."""
    with pytest.raises(PluginContractError, match="wraps strategy_skip_step, which nothing wraps"):
        job(Wraps())


# ---------------------------------------------------------------------- ranks


def steps_on_ranks(
    world: World, strategy: str, options: dict[str, Any], precision: str, fused: bool = False
) -> list[float]:
    """Compare a run whose steps are skipped at the wish of the last rank with one that does not make them."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    chosen: Any = strategy
    if options:
        from plugframe_builtins.deepspeed.strategy import DeepSpeed

        chosen = DeepSpeed(**options)
    skips = Skips(1, 3, rank=world.world_size - 1)
    with Lite(accelerator="cpu", strategy=chosen, plugins=[skips], precision=precision) as lite:
        model, weights = train(lite, fused=fused)
        buffers = lite.all_gather(model.layers[1].running_mean)
        assert torch.equal(buffers[0], buffers[1])
    if options:
        chosen = DeepSpeed(**options)
    with Lite(accelerator="cpu", strategy=chosen, precision=precision) as lite:
        expected = train(lite, skip=(1, 3), fused=fused)[1]
    same(expected, weights)
    assert (skips.num_votes, skips.num_steps) == (5, 3)
    return [float(value.sum()) for value in weights.values()]


@pytest.mark.parametrize(
    ("strategy", "precision", "fused"),
    [
        ("ddp", "32-true", False),
        ("ddp", "16-mixed", True),
        ("fsdp", "32-true", False),
        ("fsdp", "16-mixed", False),
        ("fsdp", "16-mixed", True),
    ],
)
def test_all_ranks_skip_what_one_skips(strategy: str, precision: str, fused: bool) -> None:
    """Weights and running statistics are equal on all ranks, and those of a loop without the steps."""
    first, second = run_ranks(2, steps_on_ranks, strategy, {}, precision, fused)
    assert first == second


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeed_drops_the_gradients_of_a_skipped_step(stage: int) -> None:
    """DeepSpeed's own step is not made, and what it has accumulated does not reach the next one."""
    first, second = run_ranks(2, steps_on_ranks, "deepspeed", {"stage": stage}, "32-true", timeout_s=240)
    assert first == second


# ---------------------------------------------------------------------- stop requests


def stops_on_ranks(world: World) -> list[int]:
    skips = Skips(rank=1, stops_at=2)
    found = []
    with Lite(accelerator="cpu", strategy="ddp", plugins=[skips]) as lite:
        model = Net()
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(6):
            optimizer.zero_grad()
            lite.backward(model(torch.ones(2, 4)).square().mean())
            optimizer.step()
            if lite.should_stop:
                found.append(step)
    return found


def test_a_request_on_one_rank_stops_all_at_the_same_read() -> None:
    """All ranks see it from the first read after the request on."""
    assert run_ranks(2, stops_on_ranks) == [[2, 3, 4, 5], [2, 3, 4, 5]]


def test_the_reason_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Rank 0 prints who asked for it, and why; another job starts without the request."""
    caplog.set_level("INFO")
    skips = Skips(stops_at=1)
    with job(skips) as lite:
        model = Net()
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        read = []
        for _ in range(4):
            optimizer.step()
            read.append(lite.should_stop)
    assert read == [False, True, True, True]
    assert caplog.messages.count("A plugin requests to stop, on rank 0: step 1 is the last.") == 1
    with job(skips) as lite:
        assert not lite.should_stop


def test_a_request_that_nobody_reads_is_a_warning() -> None:
    """A script that never reads ``lite.should_stop`` is told so at tear-down."""
    lite = job(Skips(stops_at=0))
    train(lite, num_steps=1)
    with pytest.warns(PlugframeWarning, match=r"requested to stop \(step 0 is the last\), and the script never read"):
        lite.teardown()
