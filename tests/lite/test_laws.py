"""The laws, for every strategy and number of ranks, on real gloo ranks."""

from __future__ import annotations

import copy
import functools
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fabric_scripts import SCRIPTS
from plugframe import CollectiveMismatchError, Lite, PlugframeWarning, SettingError, UnsupportedError, seed_everything
from plugframe.hooks.world import World
from plugframe_builtins.ddp.strategy import DDP
from ranks import run_checks

#: What can run on any number of CPU ranks; "auto" is single on one and ddp on several.
STRATEGIES = ("auto", "ddp", "fsdp")
#: Those that replicate the model on every rank.
REPLICATING = ("auto", "ddp")


@contextmanager
def ranks(world: World) -> Iterator[World]:
    """Each check creates its own `Lite` objects; each of them connects and disconnects."""
    torch.manual_seed(0)
    yield world


def model_and_data(number: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    return model, torch.randn(number, 5), torch.randn(number, 3)


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of what may be a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> list[Tensor]:
    return [whole(p.grad).clone() for p in model.parameters() if p.grad is not None]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(whole(mine), whole(other), rtol=1e-5, atol=1e-6)


def each_of(*strategies: str) -> Callable[[Callable[[Lite], None]], Callable[[World], None]]:
    def decorate(check: Callable[[Lite], None]) -> Callable[[World], None]:
        @functools.wraps(check)
        def run(world: World) -> None:
            for strategy in strategies:
                with Lite(accelerator="cpu", strategy=strategy, devices=world.world_size) as lite:
                    check(lite)

        return run

    return decorate


each_strategy = each_of(*STRATEGIES)
each_replicating = each_of(*REPLICATING)


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
    """all_reduce keeps the shape, and the dtype if it can represent the result: then it works in place."""
    ranks, rank = lite.world_size, lite.global_rank
    value = torch.full((2,), float(rank))
    assert lite.all_reduce(value).tolist() == [(ranks - 1) / 2] * 2
    assert value.tolist() == [(ranks - 1) / 2] * 2
    assert lite.all_reduce({"n": rank + 1}, reduce_op="sum")["n"].item() == ranks * (ranks + 1) // 2
    assert lite.all_reduce(torch.tensor(rank), reduce_op="max").item() == ranks - 1
    assert lite.all_reduce(torch.ones(1, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert lite.all_reduce(torch.tensor(rank)).item() == (ranks - 1) / 2
    with pytest.raises(SettingError, match="'median' is not a reduction"):
        lite.all_reduce(torch.ones(1), reduce_op="median")
    with pytest.raises(SettingError, match="all_reduce.. takes tensors, numbers, arrays, .* got str"):
        lite.all_reduce("text")
    assert lite.all_gather("text") == ["text"] * ranks


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
    """Gathering unequal shapes or dtypes is an error that lists them, on all ranks."""
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
    """Gradients of every step equal those of one process on the global batch, uneven last batches included."""
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
    """Law 6 where samples divide evenly, unevenly, and with none for one rank."""
    for number in (24, 22, 21, 19):
        _law_6(lite, number)


@each_strategy
def accumulated_gradients_equal_one_process(lite: Lite) -> None:
    """Law 6 with accumulation: micro-batches under nested no_backward_sync, then a synchronised one."""
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
    """A GAN: two models and optimizers, a frozen module, a shared parameter; each gets its own gradients."""
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


def _both(lite: Lite, model: nn.Module, step: Callable[[nn.Module, Tensor, Callable[[Tensor], None]], None]) -> None:
    """Run `step` on this rank's half of a batch under `lite`, and on the full batch in plain torch."""
    torch.manual_seed(5)
    whole = torch.randn(4 * lite.world_size, 5)
    plain = copy.deepcopy(model)
    step(model, whole[lite.global_rank :: lite.world_size], lambda loss: lite.backward(loss, retain_graph=True))
    step(plain, whole, lambda loss: loss.backward(retain_graph=True))
    assert_equal(gradients(model), gradients(plain))
    model.zero_grad()


@each_replicating
def backwards_in_any_order_equal_one_process(lite: Lite) -> None:
    """Law 6 for two forwards before two backwards, one graph twice, and submodules called directly."""

    def two(model: nn.Module, x: Tensor, backward: Callable[[Tensor], None]) -> None:
        first, second = model(x).square().mean(), model(2 * x).square().mean()
        backward(first)
        backward(second)

    def twice(model: nn.Module, x: Tensor, backward: Callable[[Tensor], None]) -> None:
        loss = model(x).square().mean()
        backward(loss)
        backward(loss)

    def parts(model: nn.Module, x: Tensor, backward: Callable[[Tensor], None]) -> None:
        backward(model[2](model[0](x)).square().mean())

    model = lite.setup(model_and_data(1)[0])
    for step in (two, twice, parts, two):
        _both(lite, model, step)


@each_replicating
def parameters_that_change_after_setup_equal_one_process(lite: Lite) -> None:
    """Law 6 when parameters are unfrozen, frozen, converted or replaced after set-up, and when all were frozen."""

    def step(model: nn.Module, x: Tensor, backward: Callable[[Tensor], None]) -> None:
        backward(model(x.to(model[0].weight.dtype)).square().mean())

    model = model_and_data(1)[0]
    model[0].requires_grad_(False)
    lite.setup(model)
    for change in (
        lambda: None,
        lambda: model[0].requires_grad_(True),
        lambda: model[2].requires_grad_(False),
        lambda: model.double(),
        lambda: setattr(model, "2", nn.Linear(7, 2).double().requires_grad_(True)),
    ):
        change()
        torch.manual_seed(lite.global_rank)
        for _ in range(2):
            _both(lite, model, step)
    teacher = lite.setup(nn.Sequential(nn.Linear(5, 2)).requires_grad_(False))
    with torch.no_grad():
        teacher(torch.ones(1, 5))
    teacher.requires_grad_(True)
    _both(lite, teacher, step)


def several_losses_of_one_forward(world: World) -> None:
    """Gradients of two heads, with a backward each that does not use the other head, are averaged."""

    class Heads(nn.Module):
        """Two heads on one body."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.body(x)
            return self.one(x).square().mean(), self.two(x).square().mean()

    def step(model: nn.Module, x: Tensor, backward: Callable[[Tensor], None]) -> None:
        for loss in model(x):
            backward(loss)

    for strategy in ("ddp", DDP(find_unused_parameters=True)):
        with Lite(accelerator="cpu", devices=world.world_size, strategy=strategy) as lite:
            model = lite.setup(Heads())
            for _ in range(2):
                _both(lite, model, step)


@each_strategy
def ranks_that_go_their_own_way_are_told(lite: Lite) -> None:
    """Gradients that are never averaged are a warning on rank 0: accumulation only, or parameters of no module."""
    expected = PlugframeWarning if lite.world_size > 1 and lite.is_global_zero else None
    model = nn.Linear(2, 2)
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with lite.no_backward_sync(model):
        lite.backward(model(torch.ones(1, 2)).sum())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
        lite.setup_optimizers(torch.optim.SGD([nn.Parameter(torch.ones(()))], lr=0.1))
    if expected is None:
        assert not caught
    else:
        never, stray = (str(warning.message) for warning in caught)
        assert "accumulated under no_backward_sync() and never averaged" in never
        assert "1 of the 1 parameters of this SGD belong to no module that was set up" in stray
    with lite.no_backward_sync(model):
        lite.backward(model(torch.ones(1, 2)).sum())
    lite.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()


# ---------------------------------------------------------------- law 7


@each_strategy
def clipping_is_one_process_clipping(lite: Lite) -> None:
    """clip_gradients gives the norm and gradients of one process, and the same error for non-finite gradients."""
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
    """An evaluation over all ranks counts every sample once, shuffled or not, for any number of samples."""
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


class Shuffling(IterableDataset[int]):
    """A stream in random order."""

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(13).tolist()


class Unseeded:
    """A sampler with its own unseeded generator."""

    def __init__(self) -> None:
        self.random = random.Random(os.urandom(8))

    def __iter__(self) -> Iterator[int]:
        return iter(self.random.sample(range(13), 13))

    def __len__(self) -> int:
        return 13


@each_strategy
def random_orders_are_divided_exactly(lite: Lite) -> None:
    """Ranks with different generators divide one order, of a stream or of a user's own generator."""
    torch.manual_seed(lite.global_rank)
    model = lite.setup(nn.Linear(1, 1)).eval()
    assert not model.training
    for loader in (DataLoader(Shuffling(), batch_size=2), DataLoader(range(13), batch_size=2, sampler=Unseeded())):
        lite.setup_dataloaders(loader)
        for _ in range(2):
            mine = torch.zeros(13, dtype=torch.int64)
            for batch in loader:
                mine[batch] += 1
            assert lite.all_reduce(mine, reduce_op="sum").tolist() == [1] * 13


# ---------------------------------------------------------------- law 9


@each_strategy
def nothing_is_left_behind(lite: Lite) -> None:
    """Tear-down restores variables, hooks, default dtype and process groups."""
    lite.teardown()
    before = (variables(), torch.get_default_dtype(), torch.distributed.is_initialized())
    assert not before[2]
    for failing in (False, True):
        with Lite(accelerator="cpu", strategy="ddp", devices=lite.world_size, precision="bf16-true") as other:
            model = other.setup(nn.Linear(2, 2))
            assert torch.distributed.is_initialized()
            if failing:
                with pytest.raises(RuntimeError):
                    model(torch.ones(3, 3))
    assert (variables(), torch.get_default_dtype(), torch.distributed.is_initialized()) == before


def variables() -> dict[str, str]:
    """Return the environment without the variables that importing torch's compiler sets."""
    return {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}


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
                for parameter in map(whole, model.parameters()):
                    assert (lite.all_gather(parameter.detach()) == parameter).all()


@each_strategy
def states_come_back(lite: Lite) -> None:
    """A checkpoint of N ranks restores model, optimizer, scheduler, plain values and generators on N ranks."""
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


@each_strategy
def epochs_go_on_where_they_were(lite: Lite) -> None:
    """A resume inside an epoch continues with each rank's remaining batches; reading ahead is a warning."""
    path = os.path.join(os.environ["LAWS_TEST_FOLDER"], f"epoch-{type(lite.strategy).__name__}-{lite.world_size}")
    model = lite.setup(nn.Linear(1, 1))

    def loaders() -> list[DataLoader[int]]:
        seed_everything(9)
        made = [DataLoader(range(29), batch_size=2, shuffle=True), DataLoader(Shuffling(), batch_size=2)]
        return lite.setup_dataloaders(*made)  # type: ignore[no-any-return]

    lite._loaders.clear()
    first = loaders()
    rest: list[list[int]] = []
    for step, pair in enumerate(zip(*first, strict=False)):
        if step >= 2:
            rest.append(torch.cat(pair).tolist())
        if step == 1:
            lite.save(path, {})
    del first
    lite._loaders.clear()
    again = loaders()
    lite.load(path, {})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert [torch.cat(pair).tolist() for pair in zip(*again, strict=False)] == rest
    assert ["2 batches of a DataLoader are read again" in str(each.message) for each in told] == [True] * (
        lite.global_rank == 0
    )
    assert model.training
    if lite.is_global_zero:
        next(iter(again[0]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lite.save(path, {})
    told = [str(warning.message) for warning in caught]
    assert len(told) == (lite.world_size > 1 and lite.is_global_zero)
    assert all("begun different numbers of epochs" in text for text in told)


def scripts_of_the_peers_run(world: World) -> None:
    """Scripts in the style of Fabric and of early Lite train on any number of ranks."""
    folder = Path(os.environ["LAWS_TEST_FOLDER"]) / f"scripts-{world.world_size}"
    folder.mkdir(exist_ok=True)
    for script in SCRIPTS:
        assert math.isfinite(script(folder, accelerator="cpu", devices=world.world_size))


def single_refuses_several_ranks(world: World) -> None:
    """A strategy for one rank is refused on several, with the names of strategies that support it."""
    if world.world_size > 1:
        with pytest.raises(UnsupportedError, match="strategy='single' works with one rank, and there are 2.*'ddp'"):
            Lite(accelerator="cpu", strategy="single")


@each_strategy
def rank_zero_goes_first(lite: Lite) -> None:
    """rank_zero_first runs rank 0 before the others; print prints once."""
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
    backwards_in_any_order_equal_one_process,
    parameters_that_change_after_setup_equal_one_process,
    several_losses_of_one_forward,
    ranks_that_go_their_own_way_are_told,
    two_models_train_together,
    clipping_is_one_process_clipping,
    evaluation_sees_every_sample_once,
    random_orders_are_divided_exactly,
    nothing_is_left_behind,
    precisions_train,
    states_come_back,
    epochs_go_on_where_they_were,
    scripts_of_the_peers_run,
    single_refuses_several_ranks,
    rank_zero_goes_first,
]


@pytest.fixture(scope="module", params=[1, 2])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("laws")
    return run_checks(request.param, ranks, CHECKS, timeout_s=300, env={"LAWS_TEST_FOLDER": str(folder)})


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_law(outcome: dict[str, str], name: str) -> None:
    """Each check above passes on one rank and on two."""
    assert not outcome[name], outcome[name]
