"""The laws every strategy and number of ranks obeys, on real gloo ranks."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from plugframe import CollectiveMismatchError, Lite, SettingError, UnsupportedError
from plugframe.world import World
from ranks import run_checks

#: What can run on any number of CPU ranks; "auto" is single on one and ddp on several.
STRATEGIES = ("auto", "ddp")


@contextmanager
def ranks(world: World) -> Iterator[World]:
    """A check makes its own `Lite`, as often as it likes: every one connects and disconnects."""
    torch.manual_seed(0)
    yield world


def model_and_data(number: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    return model, torch.randn(number, 5), torch.randn(number, 3)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def each_strategy(check: Callable[[Lite], None]) -> Callable[[World], None]:
    @functools.wraps(check)
    def run(world: World) -> None:
        for strategy in STRATEGIES:
            with Lite(accelerator="cpu", strategy=strategy, devices=world.world_size) as lite:
                check(lite)

    return run


# ---------------------------------------------------------------- law 5


@each_strategy
def gathers_keep_one_shape_law(lite: Lite) -> None:
    """all_gather stacks: (ranks, *S) for tensors of any shape, numbers, and nested collections."""
    ranks, rank = lite.world_size, lite.global_rank
    assert lite.all_gather(torch.tensor(rank)).tolist() == list(range(ranks))
    assert lite.all_gather(torch.full((2, 3), rank)).shape == (ranks, 2, 3)
    assert lite.all_gather(torch.zeros(0)).shape == (ranks, 0)
    nested = lite.all_gather({"a": [torch.ones(1), 2.5], "b": (rank, True)})
    assert nested["a"][0].shape == (ranks, 1)
    assert nested["a"][1].tolist() == [2.5] * ranks
    assert nested["b"][0].tolist() == list(range(ranks))
    assert nested["b"][1].tolist() == [True] * ranks


@each_strategy
def reductions_keep_shapes(lite: Lite) -> None:
    """all_reduce keeps the shape and the dtype; its input stays as it is."""
    ranks, rank = lite.world_size, lite.global_rank
    value = torch.full((2,), float(rank))
    assert lite.all_reduce(value).tolist() == [(ranks - 1) / 2] * 2
    assert value.tolist() == [rank] * 2
    assert lite.all_reduce({"n": rank + 1}, reduce_op="sum")["n"].item() == ranks * (ranks + 1) // 2
    assert lite.all_reduce(torch.tensor(rank), reduce_op="max").item() == ranks - 1
    assert lite.all_reduce(torch.ones(1, dtype=torch.bfloat16)).dtype is torch.bfloat16
    with pytest.raises(SettingError, match="reduce_op='mean' of a tensor of torch.int64 has no exact result"):
        lite.all_reduce(torch.tensor(1))
    with pytest.raises(SettingError, match="'median' is not a reduction"):
        lite.all_reduce(torch.ones(1), reduce_op="median")
    with pytest.raises(SettingError, match="all_gather.. takes tensors, numbers, arrays, .* got str"):
        lite.all_gather("text")


@each_strategy
def broadcasts_give_the_sources_object(lite: Lite) -> None:
    """broadcast returns the source's object, of any type, on every rank."""
    last = lite.world_size - 1
    mine = {"rank": lite.global_rank, "t": torch.tensor([lite.global_rank])}
    assert lite.broadcast(mine)["rank"] == 0
    got = lite.broadcast(mine, src=last)
    assert got["rank"] == last
    assert got["t"].tolist() == [last]
    with pytest.raises(SettingError, match="ranks go from 0 to"):
        lite.broadcast(1, src=last + 1)


@each_strategy
def unequal_shapes_are_an_error_on_every_rank(lite: Lite) -> None:
    """Ranks that gather unequal shapes or dtypes get an error that lists them, never a hang or rubbish."""
    if lite.world_size == 1:
        return
    with pytest.raises(CollectiveMismatchError, match=r"rank 0.*\(1,\).*rank 1.*\(2,\)"):
        lite.all_gather(torch.ones(lite.global_rank + 1))
    dtype = torch.float32 if lite.is_global_zero else torch.float64
    with pytest.raises(CollectiveMismatchError, match="float64"):
        lite.all_reduce(torch.ones(2, dtype=dtype))
    assert lite.all_reduce(torch.ones(1), reduce_op="sum").item() == lite.world_size


# ---------------------------------------------------------------- law 6


def _law_6(lite: Lite, number: int) -> None:
    """Gradients of every step equal those of one process on the whole batch, uneven last batches included."""
    size = 3
    model, x, y = model_and_data(number)
    plain = copy.deepcopy(model)
    model = lite.setup(model)
    loader = lite.setup_dataloaders(DataLoader(TensorDataset(x, y), batch_size=size))
    window = size * lite.world_size
    steps = 0
    for step, (a, b) in enumerate(loader):
        model.zero_grad()
        lite.backward((model(a) - b).square().mean())
        plain.zero_grad()
        whole = slice(step * window, (step + 1) * window)
        (plain(x[whole]) - y[whole]).square().mean().backward()
        assert_equal(gradients(model), gradients(plain))
        steps += 1
    assert steps == math.ceil(number / window) == len(loader)


@each_strategy
def gradients_equal_one_process(lite: Lite) -> None:
    """Law 6 where samples divide evenly, nearly, and leave a rank with none."""
    for number in (24, 22, 21, 19):
        _law_6(lite, number)


@each_strategy
def accumulated_gradients_equal_one_process(lite: Lite) -> None:
    """Law 6 with accumulation: micro-batches without synchronisation, nested in any way, then one with it."""
    model, x, y = model_and_data(21)
    plain = copy.deepcopy(model)
    model = lite.setup(model)
    loader = lite.setup_dataloaders(DataLoader(TensorDataset(x, y), batch_size=3))
    last = len(loader) - 1
    for step, (a, b) in enumerate(loader):
        with lite.no_backward_sync(model), lite.no_backward_sync(model, enabled=step != last):
            lite.backward((model(a) - b).square().mean() / len(loader))
    window = 3 * lite.world_size
    for start in range(0, 21, window):
        whole = slice(start, start + window)
        ((plain(x[whole]) - y[whole]).square().mean() / len(loader)).backward()
    assert_equal(gradients(model), gradients(plain))


@each_strategy
def two_models_train_together(lite: Lite) -> None:
    """A GAN: two models and optimizers, a frozen part, a shared parameter; each gets its own gradients."""
    torch.manual_seed(2)
    generator, critic = nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    critic[0].weight.requires_grad_(False)
    critic[1].bias = critic[0].bias
    plain = copy.deepcopy((generator, critic))
    noise = torch.randn(lite.world_size * 4, 2)
    mine = noise[lite.global_rank :: lite.world_size]
    make = torch.optim.SGD
    generator, first = lite.setup(generator, make(generator.parameters(), lr=0.1))
    critic, second = lite.setup(critic, make(critic.parameters(), lr=0.1))
    others = [make(module.parameters(), lr=0.1) for module in plain]
    for _ in range(3):
        second.zero_grad()
        lite.backward(critic(generator(mine).detach()).mean())
        second.step()
        first.zero_grad()
        lite.backward(-critic(generator(mine)).mean())
        first.step()
        others[1].zero_grad()
        plain[1](plain[0](noise).detach()).mean().backward()
        others[1].step()
        others[0].zero_grad()
        (-plain[1](plain[0](noise)).mean()).backward()
        others[0].step()
    assert_equal([p.detach() for p in generator.parameters()], [p.detach() for p in plain[0].parameters()])
    assert_equal([p.detach() for p in critic.parameters()], [p.detach() for p in plain[1].parameters()])


# ---------------------------------------------------------------- law 7


@each_strategy
def clipping_is_one_process_clipping(lite: Lite) -> None:
    """clip_gradients gives one process's norm and gradients, by norm and by value, and one error for non-finite."""
    model, x, y = model_and_data(4 * lite.world_size)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = lite.setup(model, optimizer)
    mine = slice(lite.global_rank * 4, lite.global_rank * 4 + 4)
    lite.backward((model(x[mine]) - y[mine]).square().mean())
    (plain(x) - y).square().mean().backward()
    norm = lite.clip_gradients(model, optimizer, max_norm=0.1)
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    torch.testing.assert_close(norm, expected)
    assert_equal(gradients(model), gradients(plain))
    assert lite.clip_gradients(model, optimizer, clip_val=0.01) is None
    assert max(g.abs().max() for g in gradients(model)) <= 0.01
    next(model.parameters()).grad.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        lite.clip_gradients(model, optimizer, max_norm=1.0)
    lite.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
    with pytest.raises(SettingError, match="takes one of clip_val= and max_norm="):
        lite.clip_gradients(model, optimizer)


# ---------------------------------------------------------------- law 8


@each_strategy
def evaluation_sees_every_sample_once(lite: Lite) -> None:
    """Summed over ranks an evaluation counts every sample once, shuffled or not, of any number."""
    model = lite.setup(nn.Linear(1, 1))
    for number in (1, 2, 7, 12, 13):
        for shuffle in (False, True):
            data = torch.arange(1.0, number + 1)
            loader = lite.setup_dataloaders(DataLoader(data, batch_size=3, shuffle=shuffle))
            model.eval()
            total = torch.zeros(())
            for batch in loader:
                total += batch.sum()
            assert lite.all_reduce(total, reduce_op="sum").item() == number * (number + 1) / 2


# ---------------------------------------------------------------- law 9


@each_strategy
def nothing_is_left_behind(lite: Lite) -> None:
    """After tear-down variables, hooks, default dtype and process groups are as they were."""
    lite.teardown()
    before = (dict(os.environ), torch.get_default_dtype(), torch.distributed.is_initialized())
    assert not before[2]
    for failing in (False, True):
        with Lite(accelerator="cpu", strategy="ddp", devices=lite.world_size, precision="bf16-true") as other:
            model = other.setup(nn.Linear(2, 2))
            assert torch.distributed.is_initialized()
            if failing:
                with pytest.raises(RuntimeError):
                    model(torch.ones(3, 3))
    assert (dict(os.environ), torch.get_default_dtype(), torch.distributed.is_initialized()) == before


# ---------------------------------------------------------------- precisions, state, the rest


def precisions_train(world: World) -> None:
    """Every precision trains under every strategy, and the ranks keep equal weights."""
    for strategy in STRATEGIES:
        for precision in ("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", 16, "bf16", 32, 64):
            with Lite(accelerator="cpu", strategy=strategy, devices=world.world_size, precision=precision) as lite:
                model, x, y = model_and_data(8)
                model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.05))
                loader = lite.setup_dataloaders(DataLoader(TensorDataset(x, y), batch_size=2))
                losses = []
                for _ in range(4):
                    for a, b in loader:
                        optimizer.zero_grad()
                        loss = (model(a) - b).square().mean()
                        assert loss.dtype is torch.float32
                        lite.backward(loss)
                        lite.clip_gradients(model, optimizer, max_norm=10.0)
                        optimizer.step()
                    losses.append(lite.all_reduce(loss.detach()).item())
                assert losses[-1] < losses[0]
                for parameter in model.parameters():
                    assert (lite.all_gather(parameter.detach()) == parameter).all()


@each_strategy
def states_come_back(lite: Lite) -> None:
    """What was saved on N ranks is loaded on N ranks, model, optimizer, scheduler, plain values and generators."""
    folder = os.environ["LAWS_TEST_FOLDER"]
    path = os.path.join(folder, f"{type(lite.strategy).__name__}-{lite.world_size}.safetensors")
    model, x, y = model_and_data(8)
    model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    lite.backward((model(x) - y).square().mean())
    optimizer.step()
    scheduler.step()
    torch.manual_seed(lite.global_rank)
    lite.save(path, {"model": model, "optimizer": optimizer, "scheduler": scheduler, "epoch": 3, "note": "é"})
    drawn = torch.rand(3)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for parameter in model.parameters():
        parameter.data.zero_()
    lite.backward((model(x) - y).square().mean())
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "epoch": 0}
    assert lite.load(path, state) == {"note": "é"}
    assert state["epoch"] == 3
    assert scheduler.last_epoch == 1
    assert torch.equal(torch.rand(3), drawn)
    assert_equal(list(model.state_dict().values()), list(kept[0].values()))
    ours, theirs = optimizer.state_dict(), kept[1]
    assert ours["param_groups"] == theirs["param_groups"]
    assert all(torch.equal(ours["state"][k]["exp_avg"], theirs["state"][k]["exp_avg"]) for k in theirs["state"])


def single_refuses_several_ranks(world: World) -> None:
    """A strategy for one rank is refused on several, with the names of those that fit."""
    if world.world_size > 1:
        with pytest.raises(UnsupportedError, match="strategy='single' works with one rank, and there are 2.*'ddp'"):
            Lite(accelerator="cpu", strategy="single")


@each_strategy
def rank_zero_goes_first(lite: Lite) -> None:
    """Inside rank_zero_first rank 0 is done before the others begin; print speaks once."""
    path = os.path.join(os.environ["LAWS_TEST_FOLDER"], f"first-{lite.world_size}-{type(lite.strategy).__name__}")
    with lite.rank_zero_first():
        if lite.is_global_zero:
            open(path, "w").close()
        assert os.path.exists(path)


CHECKS = [
    gathers_keep_one_shape_law,
    reductions_keep_shapes,
    broadcasts_give_the_sources_object,
    unequal_shapes_are_an_error_on_every_rank,
    gradients_equal_one_process,
    accumulated_gradients_equal_one_process,
    two_models_train_together,
    clipping_is_one_process_clipping,
    evaluation_sees_every_sample_once,
    nothing_is_left_behind,
    precisions_train,
    states_come_back,
    single_refuses_several_ranks,
    rank_zero_goes_first,
]


@pytest.fixture(scope="module", params=[1, 2])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("laws")
    return run_checks(request.param, ranks, CHECKS, timeout_s=300, env={"LAWS_TEST_FOLDER": str(folder)})


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_law(outcome: dict[str, str], name: str) -> None:
    """Each check above holds on one rank and on two."""
    assert not outcome[name], outcome[name]
