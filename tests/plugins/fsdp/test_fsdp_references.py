"""Under fsdp the user's parameters are the user's: references, hooks, values from outside, copies and states."""

from __future__ import annotations

import copy
import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from plugframe import Lite, OrderError, SettingError, UnsupportedError, UsageError
from plugframe.errors import CollectiveMismatchError, OutOfSyncError
from plugframe.hooks.world import World
from plugframe_builtins.fsdp.strategy import FSDP
from ranks import run_checks


class Net(nn.Module):
    """Blocks, an embedding, odd numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(6, 5)
        self.body = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor, skip: int = -1) -> Tensor:
        y = self.emb(x)
        for number, block in enumerate(self.body):
            y = y if number == skip else y + torch.tanh(block(y))
        out: Tensor = self.head(y)
        return out


def build(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batches(world: World) -> Tensor:
    return torch.arange(6 * world.world_size).view(world.world_size, 6) % 6


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(whole(a), b.detach(), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@contextmanager
def ranks(world: World) -> Iterator[World]:
    yield world


def lite_of(world: World, strategy: Any = "fsdp", **settings: Any) -> Lite:
    return Lite(accelerator="cpu", devices=world.world_size, strategy=strategy, **settings)


def train(
    lite: Lite, world: World, model: Net, plain: Net, step: Callable[..., Any], other: Callable[..., Any]
) -> None:
    """Two steps of both; the weights must be equal."""
    for _ in range(2):

        def ours() -> Tensor:
            model.zero_grad()
            loss = model(batches(world)[lite.global_rank]).pow(2).mean()
            lite.backward(loss)
            return lite.all_reduce(loss.detach())  # type: ignore[no-any-return]

        def theirs() -> Tensor:
            plain.zero_grad()
            loss: Tensor = plain(batches(world)).pow(2).mean()
            loss.backward()
            return loss

        step(ours)
        other(theirs)
    assert_same(model, plain)


class Own(torch.optim.Optimizer):
    """Keeps its parameters in lists, dicts, closures and containers of containers."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.flat = [p for group in self.param_groups for p in group["params"]]
        self.nested = {"pairs": [(f"{number}", p) for number, p in enumerate(self.flat)]}
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]
        self.sums: dict[Tensor, Tensor] = {p: torch.zeros_like(p) for p in self.flat}
        self.counts: defaultdict[Tensor, int] = defaultdict(int, dict.fromkeys(self.flat, 1))
        last = self.flat[-1]
        self.decay = lambda: last.mul_(0.9)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        for (_, p), slow in zip(self.nested["pairs"], self.slow[0], strict=True):
            assert self.counts[p] == 1
            self.sums[p].mul_(0.5).add_(p.grad)
            p -= 0.1 * self.sums[p]
            slow.lerp_(p, 0.5)
            p.copy_(slow)
        self.decay()


def optimizers_refer_to_what_trains(world: World) -> None:
    """Whatever an optimizer holds is re-pointed, its own tensors included, set up together or apart."""
    makers: tuple[Callable[[Any], torch.optim.Optimizer], ...] = (
        Own,
        lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3, line_search_fn="strong_wolfe"),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    )
    for make in makers:
        for apart in (False, True):
            model, plain = build(), build()
            optimizer, other = make(model.parameters()), make(plain.parameters())
            with lite_of(world) as lite:
                if apart:
                    lite.setup_module(model)
                    lite.setup_optimizers(optimizer)
                else:
                    lite.setup(model, optimizer)
                train(lite, world, model, plain, optimizer.step, other.step)


def the_scripts_lists_are_repointed(world: World) -> None:
    """A list for clipping, pairs of names and parameters, and a dict hold the new parameters; a local is told."""
    model, plain = build(), build()
    parameters, pairs = list(model.parameters()), list(model.named_parameters())
    by_name = dict(pairs)
    held = model.head.weight
    held.no_weight_decay = True  # type: ignore[attr-defined]
    with lite_of(world) as lite:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lite.setup(model, optimizer)
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        assert all(a is b for (_, a), b in zip(pairs, model.parameters(), strict=True))
        assert by_name["head.weight"] is model.head.weight
        assert model.head.weight.no_weight_decay
        with pytest.raises(OrderError, match=r"the parameter 'head.weight' of before lite.setup\(\)"):
            held.sum()
        other = torch.optim.SGD(plain.parameters(), lr=0.1)

        def step(closure: Callable[[], Any]) -> None:
            closure()
            nn.utils.clip_grad_norm_(parameters, 0.1)
            optimizer.step()

        def theirs(closure: Callable[[], Any]) -> None:
            closure()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            other.step()

        train(lite, world, model, plain, step, theirs)


def weigh(parameter: Tensor) -> None:
    """Change an accumulated gradient, as torch lets such a hook do."""
    assert parameter.grad is not None
    parameter.grad.mul_(torch.arange(5.0))


def hooks_see_whole_gradients(world: World) -> None:
    """Hooks on parameters run as in one process, those registered before set-up and after it; a handle removes."""
    for after in (False, True):
        model, plain = build(), build()
        mask = torch.tensor([0.0, 0, 0, 1, 1, 1])[:, None]

        def add(each: Net, mask: Tensor = mask) -> Any:
            each.emb.weight.register_hook(lambda g: g * mask / (1 + g.norm()))
            each.head.weight.register_post_accumulate_grad_hook(weigh)
            return each.body[0].weight.register_hook(lambda g: g * 0)

        handles = [add(plain)] if after else [add(plain), add(model)]
        with lite_of(world) as lite:
            optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
            lite.setup(model, optimizer)
            handles += [add(model)] if after else []
            for _ in range(2):
                train(
                    lite,
                    world,
                    model,
                    plain,
                    lambda c, o=optimizer: (c(), o.step()),
                    lambda c, o=other: (c(), o.step()),
                )
                for handle in handles:
                    handle.remove()


def values_from_outside_act(world: World) -> None:
    """Plain tensors may be written into parameters, and what is computed from them outside of a forward trains."""
    model, plain = build(), build()
    with lite_of(world) as lite:
        optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
        lite.setup(model, optimizer)

        def write(each: Net) -> None:
            each.load_state_dict(build(3).state_dict())
            torch.manual_seed(5)
            nn.init.normal_(each.emb.weight)
            nn.init.kaiming_uniform_(each.body[0].weight)
            each.body[1].reset_parameters()  # type: ignore[operator]
            with torch.no_grad():
                each.body[2].weight.copy_(torch.ones(5, 5))
                each.body[2].weight[1] = 2.0
                each.head.weight.mul_(torch.arange(5.0))
                each.emb.weight.uniform_()
            each.head.bias.data = torch.ones(1)
            each.body[2].bias.data.clamp_(-0.05, 0.05)

        write(model)
        write(plain)
        assert_same(model, plain)
        for _ in range(2):
            for each, own, x in ((model, optimizer, batches(world)[lite.global_rank]), (plain, other, batches(world))):
                own.zero_grad()
                penalty = sum((p - 1).pow(2).sum() for p in each.parameters())
                loss = each(x).pow(2).mean() + 0.1 * penalty + (each.head.weight @ torch.ones(5)).sum()
                lite.backward(loss) if each is model else loss.backward()
                own.step()
        assert_same(model, plain)
        if world.world_size > 1:
            different = build(lite.global_rank).state_dict()
            with pytest.raises(OutOfSyncError, match="load the same state on all"):
                model.load_state_dict(different)
        if world.world_size > 1:
            with pytest.raises(UsageError, match="would change a copy"):
                model.emb.weight.data[0].zero_()
        else:
            model.emb.weight.data[0].zero_()
            assert not whole(model.emb.weight)[0].any()


def copies_and_states_are_plain(world: World) -> None:
    """Copies hold whole tensors and follow by hand; what cannot be loaded is not written; lite.state_dict is plain."""
    model, plain = build(), build()
    with lite_of(world) as lite:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        lite.setup(model, optimizer)
        mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        twin = copy.deepcopy(model)
        assert type(twin) is Net
        assert not any(isinstance(p, DTensor) for p in twin.parameters())
        lite.backward(model(batches(world)[lite.global_rank]).pow(2).mean())
        optimizer.step()
        twin(batches(world)[0]).sum().backward()
        mean.update_parameters(model)
        with torch.no_grad():
            for a, b in zip(twin.parameters(), model.parameters(), strict=True):
                a.lerp_(b.detach(), 0.5)
        states = {all_ranks: lite.state_dict(model, all_ranks=all_ranks) for all_ranks in (False, True)}
        assert (states[False] != {}) == lite.is_global_zero
        plain.load_state_dict(states[True])
        assert_same(model, plain)
        kept = lite.state_dict(optimizer, all_ranks=True)
        torch.optim.Adam(plain.parameters()).load_state_dict(kept)
        torch.save(states[True], io.BytesIO())
        for unreadable in (model.state_dict(), optimizer.state_dict(), model):
            with pytest.raises(UsageError, match=r"torch.save\(lite.state_dict\(model\), path\)"):
                torch.save(unreadable, io.BytesIO())
        with pytest.raises(SettingError, match="takes a module or an optimizer, got int"):
            lite.state_dict(3)  # type: ignore[arg-type]


def additions_are_refused(world: World) -> None:
    """A trainable part that comes after set-up is named at the next forward, or step."""
    for change in (
        lambda m: setattr(m, "head", nn.Linear(5, 1)),
        lambda m: m.body.__setitem__(0, nn.Sequential(m.body[0], nn.Linear(5, 5))),
        lambda m: m.head.register_parameter("scale", nn.Parameter(torch.ones(1))),
    ):
        with lite_of(world) as lite:
            model = build()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            lite.setup(model, optimizer)
            change(model)
            with pytest.raises(OrderError, match=r"'(head|body\.0).*came after lite.setup\(\)"):
                model(batches(world)[0])
            with pytest.raises(OrderError, match="came after"):
                optimizer.step()


def second_derivatives_name_the_option(world: World) -> None:
    """A graph over gradients is refused with the option's name, and right with it."""

    def force(model: Net, x: Tensor) -> Tensor:
        y = model.emb.weight.new_ones(len(x), 5).requires_grad_() if x.dim() == 1 else None
        assert y is not None
        z = y
        for block in model.body:
            z = z + torch.tanh(block(z))
        (g,) = torch.autograd.grad(model.head(z).sum(), y, create_graph=True)
        return g

    class Force(Net):
        def forward(self, x: Tensor, skip: int = -1) -> Tensor:
            return super().forward(x) + force(self, x).sum()

    torch.manual_seed(0)
    plain = Force()
    with lite_of(world) as lite:
        model = lite.setup(copy.deepcopy(plain))
        with pytest.raises(UnsupportedError, match="set reshard_after_forward=False"):
            model(batches(world)[0])
    with lite_of(world, FSDP(reshard_after_forward=False)) as lite:
        model = copy.deepcopy(plain)
        optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, plain))
        lite.setup(model, optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            lite.backward(model(batches(world)[lite.global_rank]).pow(2).mean())
            optimizer.step()
            other.zero_grad()
            sum(plain(x).pow(2).mean() / world.world_size for x in batches(world)).backward()
            other.step()
        assert_same(model, plain)


def parts_left_out_by_all_have_no_gradient(world: World) -> None:
    """Ranks may take any way together; parts that all of them leave out are as in one process."""
    model, plain = build(), build()
    with lite_of(world) as lite:
        optimizer, other = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, plain))
        lite.setup(model, optimizer)
        for skip in (0, 0, 0, 1, 2, 1, 0, -1, 2):
            for each, own, x in ((model, optimizer, batches(world)[lite.global_rank]), (plain, other, batches(world))):
                own.zero_grad()
                loss = each(x, skip).pow(2).mean()
                lite.backward(loss) if each is model else loss.backward()
                own.step()
        assert_same(model, plain)


def parts_may_differ_inside_a_unit(world: World) -> None:
    """What some ranks leave out counts as zeros there, where it is gathered with a unit that all run."""
    model, plain = build(), build()
    with lite_of(world, FSDP(units=lambda _: False)) as lite:
        optimizer, other = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, plain))
        lite.setup(model, optimizer)
        for step in range(4):
            optimizer.zero_grad()
            lite.backward(model(batches(world)[lite.global_rank], (lite.global_rank + step) % 3).pow(2).mean())
            optimizer.step()
            other.zero_grad()
            losses = [plain(batches(world)[rank], (rank + step) % 3).pow(2).mean() for rank in range(world.world_size)]
            torch.stack(losses).mean().backward()
            other.step()
        assert_same(model, plain)


def ranks_apart(world: World) -> None:
    """The unit and the line are named, before anything is gathered for another unit; run last: ranks are lost."""
    with lite_of(world) as lite:
        model = lite.setup(build())
        for _ in range(2):
            lite.backward(model(batches(world)[lite.global_rank]).mean())
        with pytest.raises(CollectiveMismatchError, match=r"different submodules of this Net .* runs 'body.[01]'"):
            lite.backward(model(batches(world)[0], skip=lite.global_rank).mean())


def odd_tensors(world: World) -> None:
    """Odd tensors work, or are refused at set-up by name."""
    model = nn.Sequential(nn.Linear(5, 1), nn.Linear(1, 3))
    model.register_buffer("mask", torch.ones(1, 4).expand(3, 4))
    model[1].weight.data = torch.ones(1, 3).t()
    with lite_of(world) as lite:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lite.setup(model, optimizer)
        model.eval()
        with torch.inference_mode():
            model(torch.ones(2, 5))
        model.train()
        lite.backward(model(torch.ones(2, 5)).mean())
        assert torch.isfinite(lite.clip_gradients(model, optimizer, max_norm=1.0, norm_type=float("inf")))
        optimizer.step()
    for odd, message in (
        (nn.Parameter(torch.tensor(1.0)), "'odd' is 0-d"),
        (nn.Parameter(torch.zeros(0, 4)), "'odd' of shape .0, 4. is empty"),
        (nn.Embedding(3, 4, sparse=True), "Embedding 'odd' has sparse=True"),
    ):
        model = nn.Linear(2, 2)
        model.odd = odd
        with lite_of(world) as lite, pytest.raises(UnsupportedError, match=message):
            lite.setup(model)


ONE = (
    optimizers_refer_to_what_trains,
    the_scripts_lists_are_repointed,
    hooks_see_whole_gradients,
    values_from_outside_act,
    copies_and_states_are_plain,
    additions_are_refused,
    second_derivatives_name_the_option,
    parts_left_out_by_all_have_no_gradient,
    parts_may_differ_inside_a_unit,
    odd_tensors,
)
TWO = (*ONE, ranks_apart)


@pytest.fixture(scope="module", params=[1, 2])
def outcome(request: pytest.FixtureRequest) -> dict[str, str]:
    return run_checks(request.param, ranks, ONE if request.param == 1 else TWO, timeout_s=150.0)


@pytest.mark.parametrize("name", [check.__name__ for check in TWO])
def test_references(outcome: dict[str, str], name: str) -> None:
    """Each check, on one and two ranks; see its own docstring."""
    assert not outcome.get(name), outcome[name]
