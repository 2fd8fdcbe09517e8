"""The strategy ``deepspeed``: ZeRO 0 to 3 on real gloo ranks, and what it refuses."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from plugframe import Lite, PlugframeWarning, SettingError, UnsupportedError
from plugframe.errors import OrderError
from plugframe.hooks import Dtypes
from plugframe.hooks.world import World
from plugframe_builtins.deepspeed import build, config
from plugframe_builtins.deepspeed.strategy import DeepSpeed
from ranks import Tracking, buffers_on_ranks, hooks_of, run_checks

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

STAGES = (0, 1, 2, 3)


def lite_of(world: World, strategy: Any, **settings: Any) -> Lite:
    settings = {"accelerator": "cpu", "checkpoint": "safetensors", **settings}
    return Lite(strategy=strategy, devices=world.world_size, **settings)


def each_stage(*stages: int, **settings: Any) -> Callable[[Callable[[Lite, DeepSpeed], None]], Callable[[World], None]]:
    """Run a check once for each stage, all without arguments."""

    def decorate(check: Callable[[Lite, DeepSpeed], None]) -> Callable[[World], None]:
        @functools.wraps(check)
        def run(world: World) -> None:
            for stage in stages or STAGES:
                strategy = DeepSpeed(stage=stage)
                with lite_of(world, strategy, **settings) as lite:
                    try:
                        check(lite, strategy)
                    except BaseException as error:
                        error.add_note(f"in stage {stage}") if hasattr(error, "add_note") else None
                        raise

        return run

    return decorate


@contextmanager
def ranks(world: World) -> Iterator[World]:
    torch.manual_seed(0)
    yield world


def net() -> nn.Module:
    torch.manual_seed(1)
    # 35 + 7 + 21 + 3 elements: no tensor divides evenly by 2.
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def data(number: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(number, 5), torch.randn(number, 3)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def weights(lite: Lite, model: nn.Module) -> dict[str, Tensor]:
    """Return whole weights on every rank."""
    state = lite._hooks.strategy_module_state(module=model, sharded=True)
    return {key: whole(value) for key, value in state.items()}


def whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    return value


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], rtol: float = 1e-5) -> None:
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=rtol, atol=rtol / 5)


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def turns(lite: Lite, sizes: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Give the samples of this rank's micro-batches, and of those of all ranks."""
    start = 0
    for size in sizes:
        everyone = list(range(start, start + size * lite.world_size))
        yield everyone[lite.global_rank :: lite.world_size], everyone
        start += size * lite.world_size


# ---------------------------------------------------------------- laws 6 and 7


@each_stage()
def steps_equal_one_process(lite: Lite, strategy: DeepSpeed) -> None:
    """Law 6: gradients and weights are those of one process, with micro-batches of any size, synchronised or not."""
    model, plain = net(), net()
    model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    other = torch.optim.AdamW(plain.parameters(), lr=0.05)
    x, y = data(6 * lite.world_size)
    for local in ((), (0, 1), (1,), (2,), (0, 1, 2)):
        optimizer.zero_grad()
        other.zero_grad()
        for turn, (mine, all_) in enumerate(turns(lite, (3, 1, 2))):
            # Nested, the inner one holds.
            outer, inner = lite.no_backward_sync(model), lite.no_backward_sync(model, enabled=turn in local)
            with outer, inner:
                lite.backward(loss_of(model, x[mine], y[mine]))
            loss_of(plain, x[all_], y[all_]).backward()
        if local != (0, 1, 2):
            assert_close(strategy.gradients(model), grads(plain))
        if strategy.stage == 0 and local == ():
            assert_close(grads(model), grads(plain))
        optimizer.step()
        other.step()
    assert_close(weights(lite, model), plain.state_dict(), rtol=1e-4)


@each_stage()
def clipping_is_one_process_clipping(lite: Lite, strategy: DeepSpeed) -> None:
    """Law 7: the norm of any order, the gradients and the step after it are those of one process."""
    model, plain = net(), net()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.5))
    other = torch.optim.SGD(plain.parameters(), lr=0.5)
    x, y = data(4 * lite.world_size)
    for kwargs in ({"norm_type": 2.0}, {"norm_type": 1.0}, {"norm_type": float("inf")}, {}):
        optimizer.zero_grad()
        other.zero_grad()
        for mine, all_ in turns(lite, (3, 1)):
            lite.backward(loss_of(model, x[mine], y[mine]))
            loss_of(plain, x[all_], y[all_]).backward()
        if kwargs:
            norm = lite.clip_gradients(model, optimizer, max_norm=0.1, **kwargs)
            expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.1, **kwargs)
            torch.testing.assert_close(norm, expected, rtol=1e-5, atol=1e-6)
        else:
            assert lite.clip_gradients(model, optimizer, clip_val=0.01) is None
            nn.utils.clip_grad_value_(plain.parameters(), 0.01)
        assert_close(strategy.gradients(model), grads(plain))
        optimizer.step()
        other.step()
        assert_close(weights(lite, model), plain.state_dict())


@each_stage()
def clipping_in_the_middle_counts_once(lite: Lite, strategy: DeepSpeed) -> None:
    """A backward after clipping adds to the clipped gradients, as in one process."""
    model, plain = net(), net()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.5))
    x, y = data(4 * lite.world_size)
    for mine, all_ in turns(lite, (3, 1)):
        lite.backward(loss_of(model, x[mine], y[mine]))
        loss_of(plain, x[all_], y[all_]).backward()
        lite.clip_gradients(model, optimizer, max_norm=0.1)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    assert_close(strategy.gradients(model), grads(plain))


@each_stage()
def gradients_that_are_not_finite(lite: Lite, strategy: DeepSpeed) -> None:
    """They are an error of clip_gradients on all ranks, and a step with them is left out, which is said."""
    model = net()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.5))
    before = {key: value.clone() for key, value in weights(lite, model).items()}
    x = torch.full((2, 5), float("inf") if lite.global_rank == 0 else 1.0)
    lite.backward(model(x).sum())
    with pytest.raises(RuntimeError, match="total norm of order 2 of the gradients is nan, so they cannot be clipped"):
        lite.clip_gradients(model, optimizer, max_norm=1.0)
    if strategy.stage == 0:
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    optimizer.zero_grad()
    said = [str(warning.message) for warning in caught if warning.category is PlugframeWarning]
    assert len(said) == (lite.global_rank == 0)
    assert all("not finite, and DeepSpeed left this step of SGD out" in text for text in said)
    assert_close(weights(lite, model), before)
    lite.backward(model(torch.ones(2, 5)).sum())
    optimizer.step()
    assert not torch.equal(weights(lite, model)["0.weight"], before["0.weight"])


@each_stage()
def forgotten_gradients_are_gone(lite: Lite, strategy: DeepSpeed) -> None:
    """zero_grad of the optimizer or the model, to None or to zero, forgets what DeepSpeed has kept."""
    model, plain = net(), net()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.5))
    x, y = data(2 * lite.world_size)
    ((mine, all_),) = turns(lite, (2,))
    loss_of(plain, x[all_], y[all_]).backward()
    for forget in (
        optimizer.zero_grad,
        model.zero_grad,
        lambda: optimizer.zero_grad(set_to_none=False),
        lambda: lite.clip_gradients(model, optimizer, max_norm=0.1) and optimizer.zero_grad(),
    ):
        lite.backward(3 * loss_of(model, x[mine], y[mine]))
        forget()
        lite.backward(loss_of(model, x[mine], y[mine]))
        assert_close(strategy.gradients(model), grads(plain))
        optimizer.zero_grad()


class Heads(nn.Module):
    """Two heads on one body; a forward can leave one out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, *, both: bool) -> Tensor:
        x = self.body(x) * self.scale
        return self.one(x) + self.two(x) if both else self.one(x)


@each_stage()
def unused_parameters_have_no_gradient_left(lite: Lite, strategy: DeepSpeed) -> None:
    """A parameter that a step does not use gets nothing of an earlier step's gradient."""
    torch.manual_seed(3)
    model = Heads()
    plain = copy.deepcopy(model)
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    x, y = data(4 * lite.world_size)
    for used in ((True, True), (False, False), (False, True)):
        for (mine, all_), both in zip(turns(lite, (2, 2)), used, strict=True):
            lite.backward((model(x[mine], both=both) - y[mine]).square().mean())
            (plain(x[all_], both=both) - y[all_]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        other.step()
        other.zero_grad()
    assert_close(weights(lite, model), plain.state_dict())


@each_stage()
def steps_without_a_gradient_warn_once(lite: Lite, strategy: DeepSpeed) -> None:
    """Weight decay and momentum change a parameter that no rank used, which one process would leave as it is."""
    x, _ = data(lite.world_size)
    for settings, changes in (({"weight_decay": 0.1}, True), ({"momentum": 0.9}, True), ({}, False)):
        model = Heads()
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, **settings))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for both in (True, False, False):
                lite.backward(model(x[lite.global_rank :][:1], both=both).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        told = [str(each.message) for each in caught if "got no gradient on this rank" in str(each.message)]
        assert len(told) == (changes and strategy.stage > 0)
        assert all("Parameter 'two.weight' and 1 more" in text for text in told)


@each_stage()
def backwards_in_any_order(lite: Lite, strategy: DeepSpeed) -> None:
    """Law 6 for two forwards before two backwards, one graph twice, and several losses of one forward."""
    model, plain = net(), net()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = data(2 * lite.world_size)
    ((mine, all_),) = turns(lite, (2,))

    def two(model: nn.Module, x: Tensor, y: Tensor, backward: Callable[..., None]) -> None:
        first, second = loss_of(model, x, y), loss_of(model, 2 * x, y)
        backward(first)
        backward(second)

    def twice(model: nn.Module, x: Tensor, y: Tensor, backward: Callable[..., None]) -> None:
        loss = loss_of(model, x, y)
        backward(loss, retain_graph=True)
        backward(loss)

    # In stage 3 a part's parameters are gone after its backward: its graph cannot be used again.
    for step in (two,) if strategy.stage == 3 else (two, twice):
        step(model, x[mine], y[mine], lite.backward)
        step(plain, x[all_], y[all_], Tensor.backward)
        assert_close(strategy.gradients(model), grads(plain))
        optimizer.zero_grad()
        plain.zero_grad()


@each_stage()
def two_models_train_together(lite: Lite, strategy: DeepSpeed) -> None:
    """A GAN with a frozen part and a shared parameter: each model gets its own gradients and its own step."""
    torch.manual_seed(2)
    generator, critic = nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    critic[0].weight.requires_grad_(False)
    critic[1].bias = critic[0].bias
    plain = copy.deepcopy((generator, critic))
    noise = torch.randn(lite.world_size * 4, 2)
    mine = noise[lite.global_rank :: lite.world_size]
    make = functools.partial(torch.optim.Adam, lr=0.05)
    generator, first = lite.setup(generator, make(generator.parameters()))
    critic, second = lite.setup(critic, make([p for p in critic.parameters() if p.requires_grad]))
    others = [make([p for p in module.parameters() if p.requires_grad]) for module in plain]
    for _ in range(3):
        second.zero_grad()
        lite.backward(critic(generator(mine).detach()).square().mean())
        second.step()
        first.zero_grad()
        lite.backward(-critic(generator(mine)).mean())
        first.step()
        others[1].zero_grad()
        plain[1](plain[0](noise).detach()).square().mean().backward()
        others[1].step()
        others[0].zero_grad()
        (-plain[1](plain[0](noise)).mean()).backward()
        others[0].step()
    assert_close(weights(lite, generator), plain[0].state_dict(), rtol=1e-4)
    assert_close(weights(lite, critic), plain[1].state_dict(), rtol=1e-4)


# ---------------------------------------------------------------- the user's objects


@each_stage()
def the_optimizer_stays_the_users(lite: Lite, strategy: DeepSpeed) -> None:
    """Groups keep their parameters and settings; a scheduler made before or after set-up rules the learning rate."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 3))
    model[1].requires_grad_(False)
    plain = copy.deepcopy(model)

    def optimizer_of(module: Any) -> torch.optim.Optimizer:
        groups = [{"params": part.parameters(), "lr": lr} for part, lr in zip(module, (0.1, 9.0, 0.2), strict=True)]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    optimizer, other = optimizer_of(model), optimizer_of(plain)
    schedulers = [torch.optim.lr_scheduler.StepLR(each, 1, 0.5) for each in (optimizer, other)]
    model, adopted = lite.setup(model, optimizer)
    assert adopted is optimizer
    schedulers += [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in (optimizer, other)]
    x, y = data(2 * lite.world_size)
    ((mine, all_),) = turns(lite, (2,))
    for step in range(3):
        optimizer.zero_grad()
        other.zero_grad()
        lite.backward(loss_of(model, x[mine], y[mine]))
        loss_of(plain, x[all_], y[all_]).backward()
        optimizer.step()
        other.step()
        for scheduler in schedulers:
            scheduler.step()
        if step == 1:
            optimizer.param_groups[0]["momentum"] = other.param_groups[0]["momentum"] = 0.5
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 2]
    assert optimizer.param_groups[2]["params"][0] is model[2].weight
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in other.param_groups]
    assert_close(weights(lite, model), plain.state_dict())
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    lite.backward(loss_of(model, x[mine], y[mine]))
    with pytest.raises(UnsupportedError, match="has 4 parameter groups, and had 3 when it was set up"):
        optimizer.step()


@each_stage()
def optimizers_come_later(lite: Lite, strategy: DeepSpeed) -> None:
    """setup_module, a forward, gradients without an optimizer, then setup_optimizers with the state it has."""
    model, plain = net(), net()
    other = torch.optim.Adam(plain.parameters(), lr=0.05)
    x, y = data(2 * lite.world_size)
    ((mine, all_),) = turns(lite, (2,))
    loss_of(plain, x[all_], y[all_]).backward()
    lite.setup_module(model)
    lite.backward(loss_of(model, x[mine], y[mine]))
    assert_close(grads(model), grads(plain))
    other.step()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    # A step made by hand before: its state is carried over.
    torch.optim.Adam.step(optimizer)
    optimizer = lite.setup_optimizers(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        other.zero_grad()
        lite.backward(loss_of(model, x[mine], y[mine]))
        loss_of(plain, x[all_], y[all_]).backward()
        optimizer.step()
        other.step()
    assert_close(weights(lite, model), plain.state_dict(), rtol=1e-4)


@each_stage()
def teachers_and_buffers(lite: Lite, strategy: DeepSpeed) -> None:
    """A module without optimizer is rank 0's on all ranks; running statistics are rank 0's after a step."""
    torch.manual_seed(lite.global_rank)
    teacher = lite.setup(nn.Linear(5, 3).requires_grad_(False))
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(4, 5)
    with torch.no_grad():
        wanted = teacher(x)
    lite.backward((model(x) - wanted).square().mean())
    optimizer.step()
    for module in (teacher, model):
        for value in weights(lite, module).values():
            gathered = lite.all_gather(value)
            assert all(torch.equal(gathered[0], other) for other in gathered)


@each_stage()
def buffers_are_rank_zeros_after_a_step(lite: Lite, strategy: DeepSpeed) -> None:
    """After a step all buffers are rank 0's on every rank, persistent or not, as under torch's own DDP."""
    model = Tracking()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    lite.backward(model(torch.full((4 + lite.global_rank, 3), 1.0 + lite.global_rank)).sum())
    first, *others = buffers_on_ranks(model)
    assert all(ours != theirs for other in others for ours, theirs in zip(first, other, strict=True))
    optimizer.step()
    assert buffers_on_ranks(model) == [first] * lite.world_size


def nothing_is_left_behind(world: World) -> None:
    """Law 9: after tear-down module, parameters, optimizer, environment and libraries are as before."""
    environ, linear = dict(os.environ), nn.functional.linear
    for stage in STAGES:
        model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.0), nn.Linear(4, 3))
        plain = {name: set(vars(part)) for name, part in model.named_modules()}
        with lite_of(world, DeepSpeed(stage=stage)) as lite:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            lite.setup(model, optimizer)
            lite.backward(model(torch.ones(1, 5)).sum())
            optimizer.step()
            model.mine = "kept"
            last = weights(lite, model)
            apart = lite.setup(nn.Linear(2, 2))
            lite.backward(apart(torch.ones(1, 2)).sum())
        assert model.__dict__.pop("mine") == "kept"
        assert {name: set(vars(part)) for name, part in model.named_modules()} == plain
        assert all(not vars(parameter) for parameter in model.parameters())
        hooks = [key for part in model.modules() for key, value in vars(part).items() if "hooks" in key and value]
        assert not hooks
        assert type(model) is nn.Sequential
        assert type(model[0]._parameters) is dict
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
        if stage < 3 or world.world_size == 1:
            assert_close(model.state_dict(), last)
            model(torch.ones(1, 5)).sum().backward()
            optimizer.step()
        else:
            assert [p.numel() for p in model.parameters()] == [0] * 4
        assert dict(os.environ) == environ
        assert nn.functional.linear is linear
        assert not dist.is_initialized()


# ---------------------------------------------------------------- evaluation, initialisation


@each_stage(3)
def uneven_evaluation(lite: Lite, strategy: DeepSpeed) -> None:
    """Law 8: ranks evaluate different numbers of batches, and one that has none helps the others."""
    model = net()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    lite.backward(model(torch.ones(1, 5)).sum())
    optimizer.step()
    x, _ = data(7)
    plain = net()
    plain.load_state_dict(weights(lite, model))
    loader = lite.setup_dataloaders(DataLoader(TensorDataset(x), batch_size=2))
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            outputs = [model(batch) for (batch,) in loader]
            number = lite.all_reduce(torch.tensor(sum(len(o) for o in outputs)), reduce_op="sum")
            assert number.item() == 7
            total = lite.all_reduce(sum(o.sum() for o in outputs), reduce_op="sum")
            torch.testing.assert_close(total, plain(x).sum())


class Careful(nn.Module):
    """Initialises its parts from outside, and shares a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(70, 64)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 70, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(3))
        nn.init.normal_(self.head.weight, std=0.3)
        self.more = nn.ModuleList([nn.Linear(64, 65), nn.Linear(65, 64)])
        for name, parameter in self.named_parameters():
            if name.endswith("more.1.weight"):
                nn.init.uniform_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens))
        for part in self.more:
            x = part(x)
        return self.head(x) * self.scale.mean()


def initialised_in_parts(world: World) -> None:
    """init_module gives the values of an eager build with the same seed, in every stage, and trains alike."""
    tokens = torch.arange(4 * world.world_size)
    for stage, empty_init, precision in (
        (3, None, "32-true"),
        (3, True, "bf16-mixed"),
        (3, True, "bf16-true"),
        (2, True, "32-true"),
    ):
        torch.manual_seed(7)
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        torch.set_default_dtype(dtype)
        plain = Careful()
        torch.set_default_dtype(torch.float32)
        after = torch.rand(1)
        with lite_of(world, DeepSpeed(stage=stage), precision=precision) as lite:
            torch.manual_seed(7)
            with lite.init_module(empty_init=empty_init):
                model = Careful()
            assert torch.equal(torch.rand(1), after)
            model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
            found = weights(lite, model)
            assert list(found) == list(plain.state_dict())
            for key, value in plain.state_dict().items():
                assert torch.equal(found[key], value), (stage, precision, key)
            lite.backward(model(tokens[lite.global_rank :: lite.world_size]).square().mean())
            optimizer.step()
            if precision == "32-true":
                plain(tokens).square().mean().backward()
                torch.optim.SGD(plain.parameters(), lr=0.1).step()
                assert_close(weights(lite, model), plain.state_dict(), rtol=1e-4)


@each_stage(3)
def parts_without_an_optimizer_evaluate(lite: Lite, strategy: DeepSpeed) -> None:
    """A module built in parts evaluates without an optimizer, does not train, and can get one later."""
    torch.manual_seed(7)
    plain = Careful()
    torch.manual_seed(7)
    with lite.init_module():
        model = Careful()
    lite.setup_module(model)
    tokens = torch.arange(4)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), plain(tokens))
    with pytest.raises(OrderError, match="This Careful is sharded and has no optimizer: call lite.setup"):
        model(tokens)
    optimizer = lite.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    lite.backward(model(tokens).square().mean())
    optimizer.step()
    plain(tokens).square().mean().backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert_close(weights(lite, model), plain.state_dict(), rtol=1e-4)


# ---------------------------------------------------------------- precision


def precisions(world: World) -> None:
    """bf16 trains with float32 weights besides, bf16-true without; both follow float32 as far as they can."""
    x, y = data(4 * world.world_size)
    for stage in (1, 2, 3):
        for precision, rtol in (("bf16-mixed", 2e-2), ("bf16-true", 5e-2)):
            strategy = DeepSpeed(stage=stage)
            with lite_of(world, strategy, precision=precision) as lite:
                model, plain = net(), net()
                model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
                other = torch.optim.SGD(plain.parameters(), lr=0.1)
                assert_close(weights(lite, model), plain.state_dict(), 1e-6 if precision == "bf16-mixed" else 1e-2)
                for _ in range(3):
                    for mine, all_ in turns(lite, (3, 1)):
                        output = model(x[mine])
                        assert output.dtype is torch.float32
                        lite.backward((output - y[mine]).square().mean())
                        loss_of(plain, x[all_], y[all_]).backward()
                    norm = lite.clip_gradients(model, optimizer, max_norm=0.5)
                    expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
                    torch.testing.assert_close(norm.float(), expected, rtol=3e-2, atol=1e-2)
                    optimizer.step()
                    optimizer.zero_grad()
                    other.step()
                    other.zero_grad()
                state = weights(lite, model)
                wanted = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
                assert {value.dtype for value in state.values()} == {wanted}
                assert_close(state, plain.state_dict(), rtol)
            if stage < 3:
                assert {p.dtype for p in model.parameters()} == {wanted}


def loss_scales(world: World) -> None:
    """fp16: DeepSpeed scales the loss, clipping sees true gradients, an overflow is left out, the scale is saved."""
    from deepspeed.accelerator import get_accelerator

    # Whatever this CPU says: torch computes in float16 on any.
    get_accelerator().is_fp16_supported = lambda: True
    x, y = data(4 * world.world_size)
    for stage in (1, 2, 3):
        strategy = DeepSpeed(stage=stage, config={"fp16": {"initial_scale_power": 10, "hysteresis": 1}})
        with lite_of(world, strategy, precision="16-mixed") as lite:
            model, plain = net(), net()
            model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
            other = torch.optim.SGD(plain.parameters(), lr=0.1)
            for _ in range(2):
                for mine, all_ in turns(lite, (3, 1)):
                    lite.backward(loss_of(model, x[mine], y[mine]))
                    loss_of(plain, x[all_], y[all_]).backward()
                assert_close(strategy.gradients(model), grads(plain), rtol=2e-2)
                norm = lite.clip_gradients(model, optimizer, max_norm=0.5)
                expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
                torch.testing.assert_close(norm.float(), expected, rtol=2e-2, atol=1e-3)
                optimizer.step()
                optimizer.zero_grad()
                other.step()
                other.zero_grad()
            before = {key: value.clone() for key, value in weights(lite, model).items()}
            assert_close(before, plain.state_dict(), rtol=1e-2)
            lite.backward(1e8 * loss_of(model, x, y))
            lite.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            assert_close(weights(lite, model), before)
            state = lite._hooks.strategy_optimizer_state(optimizer=optimizer, sharded=False)
            assert state["loss_scale"]["cur_scale"] == 512.0
            state["loss_scale"]["cur_scale"] = 64.0
            lite._hooks.strategy_load_optimizer_state(optimizer=optimizer, state=state)
            assert strategy._loss_scale == 64.0
            for factor, scale in ((1.0, 64.0), (1e9, 32.0)):  # as an extension skips a step
                optimizer.zero_grad()
                lite.backward(factor * loss_of(model, x, y))
                lite._hooks.strategy_skip_step(optimizer=optimizer)
                assert strategy._loss_scale == scale
                assert_close(weights(lite, model), before)
            critic = nn.Linear(2, 2)
            with pytest.raises(UnsupportedError, match="Two models train, and in float16 DeepSpeed gives each a loss"):
                lite.setup(critic, torch.optim.SGD(critic.parameters(), lr=0.1))


# ---------------------------------------------------------------- state


def _train(lite: Lite, model: nn.Module, optimizer: Any, steps: int) -> None:
    x, y = data(2 * lite.world_size)
    ((mine, _),) = turns(lite, (2,))
    for _ in range(steps):
        optimizer.zero_grad()
        lite.backward(loss_of(model, x[mine], y[mine]))
        optimizer.step()


def checkpoints_go_both_ways(world: World, folder: str) -> None:
    """What ddp saves every stage continues, and what a stage saves ddp and the other stages continue."""

    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(len(names))
        model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
        model[2].bias.requires_grad_(False)
        groups = [
            {"params": [model[0].weight, model[2].bias]},
            {"params": [model[0].bias, model[2].weight], "lr": 0.01},
        ]
        return model, torch.optim.AdamW([*groups, {"params": model[1].parameters()}], lr=0.05)

    names = ["ddp", *STAGES, "ddp"]
    reference: dict[str, Any] = {}
    for number, name in enumerate(names):
        strategy = "ddp" if name == "ddp" else DeepSpeed(stage=name)
        with lite_of(world, strategy) as lite:
            model, optimizer = make()
            model, optimizer = lite.setup(model, optimizer)
            if number == 0:
                _train(lite, model, optimizer, 2)
                lite.save(f"{folder}/0", {"model": model, "optimizer": optimizer})
                reference = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
                continue
            lite.load(f"{folder}/{number - 1}", {"model": model, "optimizer": optimizer})
            assert_close(weights(lite, model), reference["model"], rtol=0)
            _assert_state(lite, optimizer, reference["optimizer"])
            lite.save(f"{folder}/{number}", {"model": model, "optimizer": optimizer})
            if number == 1:
                _train(lite, model, optimizer, 2)
                reference["later"] = copy.deepcopy(weights(lite, model))
            else:
                _train(lite, model, optimizer, 2)
                assert_close(weights(lite, model), reference["later"], rtol=1e-4)


def _assert_state(lite: Lite, optimizer: Any, wanted: dict[str, Any]) -> None:
    """Compare an optimizer's state, which has one entry for every trained parameter."""
    state = whole(lite._hooks.strategy_optimizer_state(optimizer=optimizer, sharded=True))
    assert state["param_groups"] == wanted["param_groups"]
    assert list(state["state"]) == list(wanted["state"])
    for number, entry in wanted["state"].items():
        for key, value in entry.items():
            assert torch.equal(state["state"][number][key], value), (number, key)


def state_in_parts(world: World) -> None:
    """State that is asked for in parts is DTensor on the ranks; whole it is on rank 0."""
    for stage, precision in ((1, "bf16-mixed"), (2, "32-true"), (3, "32-true"), (3, "bf16-mixed")):
        with lite_of(world, DeepSpeed(stage=stage), precision=precision) as lite:
            model = net()
            model, optimizer = lite.setup(model, torch.optim.Adam(model.parameters(), lr=0.1))
            _train(lite, model, optimizer, 1)
            parts = lite._hooks.strategy_module_state(module=model, sharded=True)
            full = lite._hooks.strategy_module_state(module=model, sharded=False)
            assert list(parts) == list(full) == list(net().state_dict())
            if stage == 3 or precision == "bf16-mixed":
                assert all(isinstance(value, DTensor) for value in parts.values())
                rows = [len(piece) for piece in torch.arange(7).chunk(world.world_size)]
                assert parts["0.weight"].to_local().shape[0] == rows[lite.global_rank]
            together = whole(parts)
            kept = whole(lite._hooks.strategy_optimizer_state(optimizer=optimizer, sharded=True))
            alone = lite._hooks.strategy_optimizer_state(optimizer=optimizer, sharded=False)
            if lite.global_rank == 0:
                assert all(torch.equal(full[key], together[key]) for key in full)
                assert torch.equal(alone["state"][0]["exp_avg"], kept["state"][0]["exp_avg"])
            else:
                assert alone["state"][0]["exp_avg"] is None


def own_format(world: World, folder: str) -> None:
    """save_native and load_native write and read DeepSpeed's own format."""
    for stage in (1, 3):
        strategy = DeepSpeed(stage=stage)
        with lite_of(world, strategy) as lite:
            model = net()
            model, optimizer = lite.setup(model, torch.optim.Adam(model.parameters(), lr=0.1))
            _train(lite, model, optimizer, 2)
            path = Path(folder) / f"native{stage}"
            strategy.save_native(path, model, tag="two")
            assert (path / "two").is_dir()
            saved = {key: value.clone() for key, value in weights(lite, model).items()}
            _train(lite, model, optimizer, 1)
            later = {key: value.clone() for key, value in weights(lite, model).items()}
            strategy.load_native(path, model)
            assert_close(weights(lite, model), saved)
            _train(lite, model, optimizer, 1)
            assert_close(weights(lite, model), later)
            with pytest.raises(OrderError, match=r"save_native\(\) takes a module that was set up with an optimizer"):
                strategy.save_native(path, net())


def offloaded(world: World) -> None:
    """With the optimizer (and the parameters) on the host, steps, clipping and state are the same."""
    x, y = data(4 * world.world_size)
    for options in (
        {"stage": 1, "offload_optimizer": "cpu"},
        {"stage": 2, "offload_optimizer": "cpu"},
        {"stage": 3, "offload_optimizer": "cpu", "offload_params": "cpu"},
    ):
        with lite_of(world, DeepSpeed(**options)) as lite:
            model, plain = net(), net()
            model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.05))
            other = torch.optim.AdamW(plain.parameters(), lr=0.05)
            for _ in range(3):
                for mine, all_ in turns(lite, (3, 1)):
                    lite.backward(loss_of(model, x[mine], y[mine]))
                    loss_of(plain, x[all_], y[all_]).backward()
                norm = lite.clip_gradients(model, optimizer, max_norm=0.5)
                torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(plain.parameters(), 0.5))
                optimizer.step()
                optimizer.zero_grad()
                other.step()
                other.zero_grad()
            assert_close(weights(lite, model), plain.state_dict(), rtol=1e-4)
            state = whole(lite._hooks.strategy_optimizer_state(optimizer=optimizer, sharded=True))
            torch.testing.assert_close(state["state"][0]["exp_avg"], other.state_dict()["state"][0]["exp_avg"])


@each_stage(1, 3)
def refused_calls(lite: Lite, strategy: DeepSpeed) -> None:
    """Closures, a second optimizer, one for two models, and Adagrad are refused with what to do instead."""
    model, second = net(), nn.Linear(2, 2)
    made = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    lite.setup_module(second)
    with pytest.raises(UnsupportedError, match="takes one optimizer for a model, .* make one optimizer with several"):
        lite.setup(model, *made)
    lite.setup(model, made[0])
    with pytest.raises(UnsupportedError, match="takes one optimizer for a model"):
        lite.setup_optimizers(made[1])
    lite.backward(model(torch.ones(1, 5)).sum())
    with pytest.raises(UnsupportedError, match="given a closure, which DeepSpeed cannot run"):
        made[0].step(lambda: model(torch.ones(1, 5)).sum())
    both = net()
    lite.setup_module(both)
    with pytest.raises(UnsupportedError, match=r"updates several models \(Linear, Sequential\)"):
        lite.setup_optimizers(torch.optim.SGD([*second.parameters(), *both.parameters()], lr=0.1))
    with pytest.raises(UnsupportedError, match="DeepSpeed makes an Adagrad of its own"):
        lite.setup_optimizers(torch.optim.Adagrad(second.parameters(), lr=0.1))
    model[0].bias.requires_grad_(False)
    with pytest.raises(UnsupportedError, match=r"Parameter '0.bias' was frozen, thawed or converted after lite.setup"):
        lite.backward(model(torch.ones(1, 5)).sum())
    odd = nn.Linear(2, 2).double()
    with pytest.raises(UnsupportedError, match="parameters of torch.float64, which DeepSpeed does not train"):
        lite.setup(odd, torch.optim.SGD(odd.parameters(), lr=0.1))


CHECKS = [
    steps_equal_one_process,
    clipping_is_one_process_clipping,
    clipping_in_the_middle_counts_once,
    gradients_that_are_not_finite,
    forgotten_gradients_are_gone,
    unused_parameters_have_no_gradient_left,
    steps_without_a_gradient_warn_once,
    backwards_in_any_order,
    two_models_train_together,
    the_optimizer_stays_the_users,
    optimizers_come_later,
    teachers_and_buffers,
    buffers_are_rank_zeros_after_a_step,
    nothing_is_left_behind,
    uneven_evaluation,
    initialised_in_parts,
    parts_without_an_optimizer_evaluate,
    precisions,
    loss_scales,
    state_in_parts,
    offloaded,
]


class WithFolder:
    """A check that is given a folder."""

    def __init__(self, check: Callable[[World, str], None], folder: Path) -> None:
        self.check, self.folder, self.__name__ = check, str(folder), check.__name__

    def __call__(self, world: World) -> None:
        self.check(world, self.folder)


def _report(num_ranks: int, folder: Path) -> dict[str, str]:
    with_folder = [WithFolder(check, folder) for check in (checkpoints_go_both_ways, own_format)]
    return run_checks(num_ranks, ranks, [*CHECKS, *with_folder, refused_calls], timeout_s=240)


ALL = [*CHECKS, checkpoints_go_both_ways, own_format, refused_calls]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    return {number: _report(number, tmp_path_factory.mktemp(f"ranks{number}")) for number in (1, 2)}


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("check", ALL, ids=lambda check: check.__name__)
def test_strategy(check: Any, number: int, reports: dict[int, dict[str, str]]) -> None:
    """Every check of this file, on 1 and on 2 ranks."""
    assert not reports[number][check.__name__]


# ---------------------------------------------------------------- settings

DTYPES = {
    "32-true": Dtypes(parameter=torch.float32, compute=torch.float32),
    "16-mixed": Dtypes(parameter=torch.float32, compute=torch.float16),
    "bf16-mixed": Dtypes(parameter=torch.float32, compute=torch.bfloat16),
    "strange": Dtypes(parameter=torch.float64, compute=torch.bfloat16),
}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stage": 4}, r"DeepSpeed\(stage=4\): it is one of 0, 1, 2, 3"),
        ({"stage": True}, r"DeepSpeed\(stage=True\): it is"),
        ({"offload_optimizer": "disk"}, r"offload_optimizer='disk'\): it is one of cpu, nvme"),
        ({"stage": 0, "offload_optimizer": "cpu"}, "offload_optimizer='cpu' .* no effect in stage 0: .* use stage=1"),
        ({"offload_params": "cpu"}, "offload_params='cpu' .* has no effect in stage 2: leave it out, or use stage=3"),
        ({"offload_optimizer": "nvme"}, "offload_optimizer='nvme' of strategy 'deepspeed' needs stage=3"),
        ({"nvme_path": "/local"}, "nvme_path='/local' .* has no effect: nothing is offloaded to 'nvme'"),
        ({"stage": 1, "overlap_comm": True}, "overlap_comm=True .* has no effect in stage 1"),
        ({"overlap_comm": 1.5}, r"overlap_comm=1.5\): it is true or false"),
        ({"param_persistence_threshold": 5}, "param_persistence_threshold=5 .* has no effect in stage 2"),
        ({"reduce_bucket_size": 0}, r"reduce_bucket_size=0\): it is an integer from 1"),
        ({"build_timeout_s": 0}, r"build_timeout_s=0\): it is a number above 0"),
        ({"config": {"optimizer": {}}}, r"config\['optimizer'\] .* is not used: make a torch optimizer in the script"),
        ({"config": {"scheduler": {}}}, r"config\['scheduler'\] .* is not used: make a torch scheduler"),
        ({"config": {"train_batch_size": 8}}, r"config\['train_batch_size'\] .* set it in the DataLoader"),
        ({"config": {"gradient_accumulation_steps": 4}}, r"=4 .* must be 1: accumulate with lite.no_backward_sync"),
        ({"config": {"zero_optimization": {"stage": "auto"}}}, r"config\['zero_optimization.stage'\]='auto'"),
        ({"config": "nowhere.json"}, "config='nowhere.json' .* is not a JSON file"),
        ({"config": [1]}, r"config=\[1\] .* must be a mapping or a path to a JSON file"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], match: str) -> None:
    """A wrong option, or one without effect, is an error that says what to type."""
    with pytest.raises(SettingError, match=match):
        DeepSpeed(**options)


@pytest.mark.parametrize(
    ("options", "precision", "error", "match"),
    [
        ({"config": {"fp16": {"enabled": True}}}, "32-true", SettingError, "contradicts precision='32-true': use prec"),
        ({"config": {"bf16": {"enabled": True}}}, "16-mixed", SettingError, "use precision='bf16-mixed', and leave it"),
        ({"config": {"bf16": {"enabled": False}}}, "bf16-mixed", SettingError, r"\['bf16.enabled'\]=False contradicts"),
        (
            {"stage": 0},
            "bf16-mixed",
            UnsupportedError,
            "stage=0 .* trains in float32, .* use stage=1, or strategy='ddp'",
        ),
        (
            {"stage": 1},
            "strange",
            UnsupportedError,
            "parameters in torch.float64 .* which strategy 'deepspeed' does not",
        ),
        ({"stage": 3, "offload_params": "nvme"}, "32-true", SettingError, "offload_param to NVMe needs a folder"),
        ({"config": {"zero_optimization": {"stage": 7}}}, "32-true", SettingError, "=7 must be 0, 1, 2 or 3"),
        (
            {"config": {"zero_optimization": {"stage": 1, "overlap_comm": True}}},
            "32-true",
            SettingError,
            "overlap_comm'.=True has no effect in stage 1",
        ),
    ],
)
def test_configuration_and_precision_must_agree(
    options: dict[str, Any], precision: str, error: type[Exception], match: str
) -> None:
    """What contradicts the precision is refused when that is known."""
    strategy = DeepSpeed(**options)
    with pytest.raises(error, match=match):
        config.final_config(strategy.options, strategy._raw, DTYPES[precision], precision)


def test_raw_configuration_lies_over_the_options(tmp_path: Path) -> None:
    """The final configuration has the raw one over the options, section by section, and is shown in lines."""
    path = tmp_path / "zero.json"
    path.write_text('{"gradient_clipping": 0.5, "zero_optimization": {"stage": 3, "sub_group_size": 7}}')
    strategy = DeepSpeed(stage=2, reduce_bucket_size=100, offload_optimizer="cpu", config=path)
    assert strategy.stage == 3
    lines = strategy.strategy_describe()
    assert all("\n" not in line for line in lines)
    assert "gradient_clipping: 0.5" in lines
    zero = '{"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 100, "stage": 3, "sub_group_size": 7}'
    assert f"zero_optimization: {zero}" in lines
    # DeepSpeed's own default would clip.
    assert "gradient_clipping: 0.0" in DeepSpeed().strategy_describe()


def test_names_stand_for_options() -> None:
    """Every name gives the stage and the offloading it says."""
    import plugframe_builtins.deepspeed as names

    for name in ("plugin", "stage_1", "stage_2_offload", "stage_3", "stage_3_offload", "stage_3_offload_nvme"):
        descriptor = getattr(names, name)
        strategy = DeepSpeed(**descriptor.preset)
        assert strategy.stage == (2 if name == "plugin" else int(name[6]))
        assert strategy.options.offload_optimizer == (
            "nvme" if "nvme" in name else "cpu" if "offload" in name else None
        )
        assert descriptor.requires == ("deepspeed",)
        assert descriptor.extra == "plugframe[deepspeed]"


# ---------------------------------------------------------------- compiling


def test_tools_are_looked_for(tmp_path: Path) -> None:
    """Compiling without ninja or without a compiler is refused with what to install."""
    ninja = tmp_path / "ninja"
    with pytest.raises(UnsupportedError, match="compiles an_op here, and there is no ninja in PATH: pip install ninja"):
        build.check_toolchain("an_op", {"PATH": str(tmp_path)})
    ninja.write_text("")
    ninja.chmod(0o755)
    with pytest.raises(
        UnsupportedError, match=r"no C\+\+ compiler 'my-cxx' in PATH: install one .*, or name one in CXX"
    ):
        build.check_toolchain("an_op", {"PATH": str(tmp_path), "CXX": "my-cxx"})
    (tmp_path / "my-cxx").write_text("")
    (tmp_path / "my-cxx").chmod(0o755)
    build.check_toolchain("an_op", {"PATH": str(tmp_path), "CXX": "my-cxx"})


def test_stale_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that a killed run left is waited for only so long, on all ranks, and the error says what to delete."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "an_op").mkdir()
    lock = tmp_path / "an_op" / "lock"
    lock.touch()
    monkeypatch.setattr(build, "check_toolchain", lambda op: None)
    loaded: list[int] = []
    hooks = hooks_of(collective_all_gather_object=lambda obj, group: ["", obj])
    with pytest.raises(UnsupportedError, match=f"{lock} is there since more than 0.01 s.*: delete that file"):
        build.build("an_op", lambda: loaded.append(0), builds=True, hooks=hooks, timeout_s=0.01)
    assert not loaded
    lock.unlink()
    build.build("an_op", lambda: loaded.append(0), builds=True, hooks=hooks, timeout_s=0.01)
    build.build("an_op", lambda: loaded.append(1), builds=False, hooks=hooks, timeout_s=0.01)
    assert loaded == [0, 1]
    told = hooks_of(collective_all_gather_object=lambda obj, group: ["there is no ninja", obj])
    with pytest.raises(UnsupportedError, match="there is no ninja"):
        build.build("an_op", lambda: loaded.append(1), builds=False, hooks=told, timeout_s=0.01)


def test_lock_is_where_torch_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is looked for in torch's own folder, with and without TORCH_EXTENSIONS_DIR."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert build.lock_of("an_op") == tmp_path / "an_op" / "lock"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert build.lock_of("an_op").parts[-2:] == ("an_op", "lock")


def test_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the name stays listed, and choosing it says how to install it."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else find(name, *a))
    with pytest.raises(ValueError, match=r"deepspeed.*pip install 'plugframe\[deepspeed\]'"):
        Lite(accelerator="cpu", devices=1, strategy="deepspeed_stage_1")
