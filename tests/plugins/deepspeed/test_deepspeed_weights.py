"""The strategy ``deepspeed``: what a script does to parameters and optimizers acts as in one process, or is refused."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from plugframe import Lite, UnsupportedError
from plugframe.errors import CollectiveMismatchError, OrderError, PlugframeWarning
from plugframe.hooks.world import World
from plugframe_builtins.deepspeed.rounding import Rounding
from plugframe_builtins.deepspeed.strategy import DeepSpeed
from plugframe_builtins.deepspeed.trial import check_elementwise
from ranks import run_checks
from test_deepspeed_strategy import (
    assert_close,
    data,
    each_stage,
    grads,
    lite_of,
    loss_of,
    net,
    ranks,
    turns,
    weights,
)

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

SHARDED = (1, 2, 3)


class Pair:
    """A model under the strategy and its twin in plain torch, with an optimizer each."""

    def __init__(self, lite: Lite, make: Callable[[], nn.Module] = net, optimizer: Any = SGD) -> None:
        self.lite = lite
        self.model, self.plain = make(), make()
        self.optimizer, self.other = optimizer(self.model.parameters()), optimizer(self.plain.parameters())
        lite.setup(self.model, self.optimizer)

    def backward(self, loss: Callable[..., Tensor] = loss_of) -> None:
        x, y = data(3 * self.lite.world_size)
        ((mine, all_),) = turns(self.lite, (3,))
        self.optimizer.zero_grad()
        self.other.zero_grad()
        self.lite.backward(loss(self.model, x[mine], y[mine]))
        loss(self.plain, x[all_], y[all_]).backward()

    def step(self, loss: Callable[..., Tensor] = loss_of) -> None:
        self.backward(loss)
        self.optimizer.step()
        self.other.step()

    def check(self) -> None:
        assert_close(weights(self.lite, self.model), self.plain.state_dict())


# ---------------------------------------------------------------- weights


def _assigned(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5


def _clamped(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.05, 0.05)


def _scaled(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(0.5)


def _loaded(model: nn.Module) -> None:
    torch.manual_seed(9)
    model.load_state_dict(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).state_dict())


def _from_vector(model: nn.Module) -> None:
    numel = sum(parameter.numel() for parameter in model.parameters())
    nn.utils.vector_to_parameters(torch.linspace(-1, 1, numel), model.parameters())


CHANGES = (
    _assigned,
    _clamped,
    _scaled,
    _loaded,
    _from_vector,
    lambda model: nn.init.constant_(model.get_parameter("2.weight"), 0.1),
)


@each_stage()
def changed_weights_hold(lite: Lite, strategy: DeepSpeed) -> None:
    """What a script writes into parameters holds in the next steps; in stage 3 within `gathered`, or is refused."""
    pair = Pair(lite)
    pair.step()
    for change in CHANGES:
        if strategy.stage == 3:
            with pytest.raises((UnsupportedError, RuntimeError), match=r"(?s)stage 3.*lite.strategy.gathered"):
                change(pair.model)
            if change in (_assigned, _from_vector):  # DeepSpeed takes back what was written in place alone
                continue
            with strategy.gathered(pair.model, write=True):
                change(pair.model)
        else:
            change(pair.model)
        change(pair.plain)
        pair.step()
        pair.check()


@each_stage(*SHARDED, precision="bf16-mixed")
def changed_weights_hold_in_low_precision(lite: Lite, strategy: DeepSpeed) -> None:
    """The weights in float32 follow a parameter changed in bfloat16, and keep their precision where it was not."""
    pair = Pair(lite, optimizer=lambda parameters: SGD(parameters, lr=1e-4))
    before = weights(lite, pair.model)
    with strategy.gathered(pair.model, write=True), torch.no_grad():
        pair.model.get_parameter("0.weight").fill_(0.5)
    pair.step()
    after = weights(lite, pair.model)
    assert torch.allclose(after["0.weight"], torch.tensor(0.5), atol=1e-3)
    change = (after["2.weight"] - before["2.weight"]).abs()
    assert 0 < change.max() < 1e-3  # smaller than what bfloat16 would have lost


@each_stage()
def penalties_on_weights(lite: Lite, strategy: DeepSpeed) -> None:
    """A term over parameters outside of forward counts, or is refused in stage 3."""

    def penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(model, x, y)
        for parameter in model.parameters():
            loss = loss + 0.1 * parameter.pow(2).sum()
        return loss

    pair = Pair(lite)
    if strategy.stage == 3:
        with pytest.raises(UnsupportedError, match=r"Parameter '0.weight' is used outside of forward \(Tensor.pow\)"):
            pair.step(penalty)
        assert [tuple(p.shape) for p in pair.model.parameters()] == [tuple(p.shape) for p in pair.plain.parameters()]
        assert sum(p.numel() for p in pair.model.parameters()) == sum(p.numel() for p in pair.plain.parameters())
        assert [p.dim() for p in pair.model.parameters()] == [2, 1, 2, 1]
        return
    pair.step(penalty)
    pair.check()


@each_stage()
def copies_are_whole(lite: Lite, strategy: DeepSpeed) -> None:
    """Copies, pickles and states are those of a plain model, or an error at that call."""
    pair = Pair(lite)
    pair.step()
    state: Any = None
    if strategy.stage == 3:
        for call in (copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO()), AveragedModel):
            with pytest.raises(
                UnsupportedError, match=r"(deepcopy|pickle) of a Sequential .* would hold empty tensors"
            ):
                call(pair.model)
        with pytest.raises(UnsupportedError, match=r"'0.bias' is used outside of forward \(deepcopy\)"):
            copy.deepcopy(dict(pair.model[0].named_parameters())["bias"])
        for part in (pair.model, pair.model[0]):
            with pytest.raises(UnsupportedError, match=r"lite.state_dict\(model\)"):
                part.state_dict()
        return
    average = AveragedModel(pair.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    copies = copy.deepcopy(pair.model), pickle.loads(pickle.dumps(pair.model))
    for again in copies:
        assert_close(again.state_dict(), pair.plain.state_dict())
        assert all(not vars(parameter) for parameter in again.parameters())
    for saved in (pair.model, pair.model.state_dict()):
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=False)
        assert_close(state.state_dict() if saved is pair.model else state, pair.plain.state_dict())
    average.update_parameters(pair.model)
    pair.step()
    average.update_parameters(pair.model)
    first, now = copies[0].state_dict(), pair.plain.state_dict()
    assert_close(average.module.state_dict(), {key: (first[key] + now[key]) / 2 for key in now})


@each_stage()
def optimizer_states_are_refused(lite: Lite, strategy: DeepSpeed) -> None:
    """The state that DeepSpeed keeps is not in ``optimizer.state_dict()``, which says so; it cannot be loaded there."""
    pair = Pair(lite, optimizer=lambda parameters: torch.optim.Adam(parameters))
    pair.step()
    with pytest.raises(UnsupportedError, match=r"Adam.state_dict\(\) .* lite.save"):
        pair.optimizer.state_dict()
    with pytest.raises(UnsupportedError, match=r"Adam.load_state_dict\(\) .* lite.load"):
        pair.optimizer.load_state_dict(pair.other.state_dict())
    for call in (copy.deepcopy, pickle.dumps):
        with pytest.raises(UnsupportedError, match=r"Adam.state_dict\(\) .* lite.save"):
            call(pair.optimizer)


# ---------------------------------------------------------------- gradients


@each_stage(*SHARDED)
def gradients_by_hand_are_refused(lite: Lite, strategy: DeepSpeed) -> None:
    """Whatever reads, sets or makes gradients beside the strategy is refused by name; zeroing them is not."""
    pair = Pair(lite)
    pair.backward()
    with pytest.raises(UnsupportedError, match=r"'0.weight'.grad is read, .* lite.clip_gradients\(model"):
        nn.utils.clip_grad_norm_(pair.model.parameters(), 1.0)
    with pytest.raises(UnsupportedError, match="'0.bias'.grad is set by hand"):
        pair.model.get_parameter("0.bias").grad = torch.ones(7)
    assert_close(strategy.gradients(pair.model), grads(pair.plain))
    for parameter in pair.model.parameters():
        parameter.grad = None
    pair.optimizer.step()
    pair.check()
    pair.backward()
    pair.model[0].zero_grad()
    with pytest.raises(
        UnsupportedError, match=r"gradient of '0.\w+' was set to None, that of Parameter '2.weight' was"
    ):
        pair.optimizer.step()
    pair.step()
    assert all(parameter.grad is None for parameter in pair.model.parameters())
    pair.step()
    pair.check()
    lite.backward(pair.model(torch.ones(1, 5)).sum())
    with pytest.raises(OrderError, match=r"SGD.step\(\) without zero_grad\(\) since the step before"):
        pair.optimizer.step()
    pair.optimizer.zero_grad()
    with pytest.raises(OrderError, match=r"A backward outside of lite.backward\(\) has reached Parameter"):
        pair.model(torch.ones(1, 5)).sum().backward()


@each_stage(1, 2)
def gradients_set_without_backward(lite: Lite, strategy: DeepSpeed) -> None:
    """A step on gradients that the script has made by itself is refused: DeepSpeed would not see them."""
    pair = Pair(lite)
    for parameter in pair.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(OrderError, match=r"'0.weight' has a gradient that did not come from lite.backward\(\)"):
        pair.optimizer.step()


@each_stage(*SHARDED)
def hooks_of_parameters(lite: Lite, strategy: DeepSpeed) -> None:
    """Tensor hooks of before and after set-up run; post-accumulate hooks are refused by the parameter's name."""
    model, plain = net(), net()
    for each in (model, plain):
        each[0].weight.register_hook(lambda gradient: gradient * 0.5)
    model[0].weight.tag = "mine"
    optimizer, other = SGD(model.parameters(), lr=0.1), SGD(plain.parameters(), lr=0.1)
    lite.setup(model, optimizer)
    for each in (model, plain):
        each[2].weight.register_hook(lambda gradient: gradient * 0)
    x, y = data(3 * lite.world_size)
    ((mine, all_),) = turns(lite, (3,))
    warned = lite.world_size > 1 and lite.is_global_zero
    expected = pytest.warns(PlugframeWarning, match="sees each rank's own gradient") if warned else nullcontext()
    with expected:
        lite.backward(loss_of(model, x[mine], y[mine]))
    loss_of(plain, x[all_], y[all_]).backward()
    optimizer.step()
    other.step()
    assert_close(weights(lite, model), plain.state_dict())
    assert model[0].weight.tag == "mine"
    with pytest.raises(UnsupportedError, match=r"Parameter '2.bias' has a hook of register_post_accumulate_grad_hook"):
        model[2].bias.register_post_accumulate_grad_hook(lambda parameter: None)
    hooked = net()
    hooked[2].bias.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(UnsupportedError, match=r"Parameter '2.bias' has a hook of register_post_accumulate_grad_hook"):
        lite.setup(hooked, SGD(hooked.parameters(), lr=0.1))


@each_stage()
def frozen_for_a_forward(lite: Lite, strategy: DeepSpeed) -> None:
    """A model frozen for the forward of another's loss, and thawed before its own backward, trains as in torch."""
    pair = Pair(lite)

    def step(model: nn.Module, optimizer: Optimizer, x: Tensor, backward: Callable[[Tensor], None]) -> None:
        first = model(x)
        model.requires_grad_(False)
        inner = x.clone().requires_grad_()
        backward(model(inner).mean())
        model.requires_grad_(True)
        optimizer.zero_grad()
        backward(first.pow(2).mean())
        optimizer.step()

    x, _ = data(3 * lite.world_size)
    ((mine, all_),) = turns(lite, (3,))
    for _ in range(2):
        step(pair.model, pair.optimizer, x[mine], lite.backward)
        step(pair.plain, pair.other, x[all_], lambda loss: loss.backward())
    pair.check()


@each_stage(*SHARDED)
def added_parameters_are_refused(lite: Lite, strategy: DeepSpeed) -> None:
    """A layer or parameter that came after set-up is named at the next forward."""
    pair = Pair(lite)
    pair.model.append(nn.Linear(3, 3))
    with pytest.raises(UnsupportedError, match=r"Parameter '3.weight' was added or replaced after lite.setup\(\)"):
        pair.model(torch.ones(1, 5))
    pair.model.pop(3)
    pair.model[0].teacher = nn.Linear(3, 3).requires_grad_(strategy.stage == 3)
    if strategy.stage < 3:
        pair.step()
        pair.model[0].teacher.requires_grad_(True)
    with pytest.raises(UnsupportedError, match=r"Parameter '0.teacher.weight' was added"):
        pair.model(torch.ones(1, 5))
    del pair.model[0].teacher
    if strategy.stage < 3:
        pair.model[0].bias.data = torch.zeros(8)
        with pytest.raises(
            UnsupportedError, match=r"'0.bias' was \(7,\), torch.float32 at lite.setup\(\) and is \(8,\)"
        ):
            pair.model(torch.ones(1, 5))


# ---------------------------------------------------------------- graphs


class Experts(nn.Module):
    """Experts; each call uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.inner = nn.Linear(5, 5)
        self.experts = nn.ModuleList(nn.Linear(5, 5, bias=number < 2) for number in range(3))
        self.outer = nn.Linear(5, 3)

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        return self.outer(self.experts[chosen](self.inner(x)).relu())


class Choosing(nn.Module):
    """The block that chooses, as a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Experts()
        self.before = nn.Linear(5, 5)

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        return self.model(self.before(x), chosen)


def _choose(lite: Lite, make: Callable[[], nn.Module], prepare: Callable[[nn.Module], object] = id) -> None:
    model, plain = make(), make()
    prepare(model)
    # With momentum a gradient of zeros is no gradient: it is that of SGD alone.
    model, optimizer = lite.setup(model, SGD(model.parameters(), lr=0.1))
    other = SGD(plain.parameters(), lr=0.1)
    x, y = data(2 * lite.world_size)
    for step in range(4):
        chosen = [(rank + step) % 3 for rank in range(lite.world_size)]
        for _ in range(1 + step % 2):
            own = slice(2 * lite.global_rank, 2 * lite.global_rank + 2)
            lite.backward((model(x[own], chosen[lite.global_rank]) - y[own]).square().mean())
            losses = [
                (plain(x[2 * r : 2 * r + 2], pick) - y[2 * r : 2 * r + 2]).square().mean()
                for r, pick in enumerate(chosen)
            ]
            torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        other.step()
        other.zero_grad()
    assert_close(weights(lite, model), plain.state_dict())


@each_stage()
def ranks_choose_experts(lite: Lite, strategy: DeepSpeed) -> None:
    """Ranks that run different experts get the gradients of one process where parameters are not sharded."""
    _choose(lite, Experts)


def experts_in_shards(world: World) -> None:
    """In stage 3 parts in shards are named on all ranks before they are mixed; a leaf module gathers them all."""
    import deepspeed

    with lite_of(world, DeepSpeed(stage=3, param_persistence_threshold=0)) as lite:
        if world.world_size > 1:
            with pytest.raises(CollectiveMismatchError, match=r"rank 0 reached 'experts.0' \(Linear, 30 elements\)"):
                _choose(lite, Experts)
        else:
            _choose(lite, Experts)
    with lite_of(world, DeepSpeed(stage=3, param_persistence_threshold=0)) as lite:
        _choose(lite, Choosing, lambda model: deepspeed.utils.set_z3_leaf_modules(model, [Experts]))


def experts_in_small_buckets(world: World) -> None:
    """Where some gradients are averaged before the others come, ranks that use other parameters are told so."""
    with lite_of(world, DeepSpeed(stage=2, reduce_bucket_size=40)) as lite:
        if world.world_size > 1:
            with pytest.raises(CollectiveMismatchError, match=r"0 reached a backward .*\(reduce_bucket_size=133\)"):
                _choose(lite, Experts)
        else:
            _choose(lite, Experts)
    for stage in (2, 3):
        with lite_of(world, DeepSpeed(stage=stage, reduce_bucket_size=40)) as lite:
            pair = Pair(lite)
            pair.step()
            pair.step()
            pair.check()


class Forces(nn.Module):
    """An energy and the gradient of its input, as in a force field."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        energy = self.two(self.one(x).tanh())
        return energy, torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


def _forces(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    energy, force = model(x)
    return energy.square().mean() + force.square().mean()


def _penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    energy = model(x)
    (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return energy.square().mean() + (gradient.norm(dim=1) - 1).square().mean()


@each_stage()
def second_derivatives(lite: Lite, strategy: DeepSpeed) -> None:
    """A gradient in forward, or a gradient penalty, trains as in one process where parameters are not sharded."""
    for make, loss in ((Forces, _forces), (net, _penalty)):
        pair = Pair(lite, make)
        for _ in range(2):
            pair.step(loss)
        pair.check()


def second_derivatives_in_shards(world: World) -> None:
    """In stage 3 a backward beside lite.backward that needs a part in shards is refused by the part's name."""
    for make, loss in ((Forces, _forces), (net, _penalty)):
        with lite_of(world, DeepSpeed(stage=3, param_persistence_threshold=0)) as lite:
            pair = Pair(lite, make)
            with pytest.raises(UnsupportedError, match=r"as of torch.autograd.grad\(\), reached '(two|2)' \(Linear"):
                pair.step(loss)


class Odd(nn.Module):
    """A parameter without dimensions, and one with fewer rows than there are ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.row = nn.Linear(5, 1, bias=False)
        self.conv = nn.Conv2d(1, 2, 2).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.conv(x[:, None, :, None].expand(-1, 1, 5, 2))
        # Of each sample: a mean over the batch would be another on every rank.
        return (self.row(x) * self.scale.exp()).expand(-1, 3) + pixels.mean((1, 2, 3))[:, None]


@each_stage()
def odd_parameters_train(lite: Lite, strategy: DeepSpeed) -> None:
    """Parameters of any shape train as in one process, and norms of any order are those of one process."""
    pair = Pair(lite, Odd)
    for norm_type in (2.0, float("inf")):
        pair.backward()
        norm = lite.clip_gradients(pair.model, pair.optimizer, max_norm=1e9, norm_type=norm_type)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(pair.plain.parameters(), 1e9, norm_type))
        pair.optimizer.step()
        pair.other.step()
    pair.check()


@each_stage(*SHARDED)
def odd_parameters_are_refused(lite: Lite, strategy: DeepSpeed) -> None:
    """Empty, complex and mixed parameters, and sparse gradients, are named at set-up, and nothing has changed."""
    for change, match in (
        (lambda m: m.register_parameter("none", nn.Parameter(torch.zeros(0, 4))), "Parameter 'none' is empty"),
        (lambda m: m.register_parameter("c", nn.Parameter(torch.zeros(2, dtype=torch.cfloat))), r"complex64.*\('c'\)"),
        (lambda m: m.append(nn.Embedding(3, 3, sparse=True)), "Embedding '3' has sparse=True"),
        (lambda m: m[0].bfloat16(), "parameters of torch.bfloat16 and torch.float32"),
    ):
        model: Any = net()
        change(model)
        with pytest.raises(UnsupportedError, match=match):
            lite.setup(model, SGD(model.parameters(), lr=0.1))
    if strategy.stage == 3:
        compiled = torch.compile(net(), backend="eager")
        with pytest.raises(UnsupportedError, match=r"compile the model in place with model.compile\(\)"):
            lite.setup(compiled, SGD(compiled.parameters(), lr=0.1))


@each_stage(3)
def inference_before_training(lite: Lite, strategy: DeepSpeed) -> None:
    """A forward under inference_mode before the first step leaves parameters that can be trained."""
    pair = Pair(lite)
    with torch.inference_mode():
        pair.model(torch.ones(1, 5))
    pair.step()
    pair.check()


# ---------------------------------------------------------------- optimizers


class OwnList(Optimizer):
    """Steps through a list of its own."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})
        self.flat = [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.flat:
            if parameter.grad is not None:
                parameter -= self.param_groups[0]["lr"] * parameter.grad


class Around(Optimizer):
    """Slow weights around another optimizer."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.base = SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base.step()
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
            slow.lerp_(parameter, 0.5)
            parameter.copy_(slow)


class ByNorm(OwnList):
    """Scales each step by norms of a parameter, as LARS does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.norm() / (parameter.grad.norm() + 1e-8) * parameter.grad


class Pairs(OwnList):
    """Steps through pairs of a parameter and something else."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self.pairs = [(parameter, 1.0) for parameter in self.flat]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter, factor in self.pairs:
            if parameter.grad is not None:
                parameter -= factor * parameter.grad


@each_stage(*SHARDED)
def optimizers_of_the_scripts_own(lite: Lite, strategy: DeepSpeed) -> None:
    """Lists of its own and an optimizer inside train what one process trains, and refer to the script's parameters."""
    for make in (OwnList, Around):
        pair = Pair(lite, optimizer=make)
        for _ in range(3):
            pair.step()
        pair.check()
        if make is OwnList:
            assert [id(p) for p in pair.optimizer.flat] == [id(p) for p in pair.model.parameters()]


@each_stage(1, 3)
def optimizers_that_need_whole_parameters(lite: Lite, strategy: DeepSpeed) -> None:
    """Such an optimizer is refused at set-up, and the model can be set up with another."""
    model = net()
    for make, match in (
        (ByNorm, "ByNorm cannot update the flat tensors"),
        (Pairs, "does not step on what param_groups hold then. Its attribute 'flat' refers to parameters"),
        (torch.optim.LBFGS, "LBFGS evaluates a closure several times"),
    ):
        with pytest.raises(UnsupportedError, match=match):
            lite.setup(model, make(model.parameters()))
    _, optimizer = lite.setup(model, SGD(model.parameters(), lr=0.1))
    lite.backward(model(torch.ones(1, 5)).sum())
    optimizer.step()


CHECKS = [
    changed_weights_hold,
    changed_weights_hold_in_low_precision,
    penalties_on_weights,
    copies_are_whole,
    optimizer_states_are_refused,
    gradients_by_hand_are_refused,
    gradients_set_without_backward,
    hooks_of_parameters,
    frozen_for_a_forward,
    added_parameters_are_refused,
    ranks_choose_experts,
    experts_in_shards,
    experts_in_small_buckets,
    second_derivatives,
    second_derivatives_in_shards,
    odd_parameters_train,
    odd_parameters_are_refused,
    inference_before_training,
    optimizers_of_the_scripts_own,
    optimizers_that_need_whole_parameters,
]


@pytest.fixture(scope="module")
def reports() -> dict[int, dict[str, str]]:
    return {number: run_checks(number, ranks, CHECKS, timeout_s=240) for number in (1, 2)}


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_weights(check: Any, number: int, reports: dict[int, dict[str, str]]) -> None:
    """Every check of this file, on 1 and on 2 ranks."""
    assert not reports[number][check.__name__]


# ---------------------------------------------------------------- the trial


def _parameters() -> Iterator[nn.Parameter]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Conv2d(2, 3, 2)).parameters()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (OwnList, None),
        (Around, None),
        (lambda parameters: type("Mine", (torch.optim.AdamW,), {})(parameters, lr=0.0), None),
        (ByNorm, "ByNorm cannot update .* on a part of them it takes another step"),
        (Pairs, "Pairs cannot update .* it does not step on what param_groups hold"),
        (torch.optim.Adafactor, "Adafactor cannot update"),
    ],
)
def test_trial_finds_what_is_not_elementwise(make: Any, refused: str | None, num_parts: int, apart: bool) -> None:
    """An optimizer is refused if it would step a flat part otherwise; the trial changes nothing."""
    parameters = list(_parameters())
    optimizer = make(parameters)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before, random = [parameter.detach().clone() for parameter in parameters], torch.get_rng_state()
    if refused is None:
        check_elementwise(optimizer, num_parts=num_parts, apart=apart)
    else:
        with pytest.raises(UnsupportedError, match=refused):
            check_elementwise(optimizer, num_parts=num_parts, apart=apart)
    assert all(map(torch.equal, before, parameters))
    assert torch.equal(random, torch.get_rng_state())
    assert not optimizer.state


def test_frozen_weights_that_are_rounded_are_told() -> None:
    """DeepSpeed keeps no float32 copy of them: one warning, unless 16 bits hold their values or none is rounded."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    exact = nn.Linear(2, 2).bfloat16().float().requires_grad_(False)
    for each, dtype, number in ((module, torch.bfloat16, 1), (module, None, 0), (exact, torch.bfloat16, 0)):
        rounding = Rounding(each, dtype)
        for parameter in each.parameters():
            rounding.note(parameter)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rounding.warn()
        assert len(caught) == number
    rounding = Rounding(module, torch.bfloat16)
    rounding.note(module[1].weight)
    with pytest.warns(PlugframeWarning, match="'1.weight' of Sequential is float32, and .* rounds it to bfloat16"):
        rounding.warn()
