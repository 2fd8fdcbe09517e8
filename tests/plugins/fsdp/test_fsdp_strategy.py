"""The strategy fsdp, on real gloo ranks: what it does beyond the laws that hold for every strategy."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from plugframe import Lite, OrderError, PlugframeWarning, SettingError, UnsupportedError, UsageError
from plugframe.hooks.world import World
from plugframe_builtins._shared.fully_shard.policy import make_policy
from plugframe_builtins._shared.fully_shard.units import find_units, split_dtypes
from plugframe_builtins._shared.sharding.mesh import check_mesh
from plugframe_builtins.fsdp.strategy import FSDP
from plugframe_builtins.precisions import MixedPrecision, TruePrecision
from ranks import Tracking, buffers_on_ranks, run_checks


class Block(nn.Module):
    """One of several blocks of a model."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return out


class Model(nn.Module):
    """Blocks in a list, a head that shares its weights with the embedding, a buffer, a part that is frozen."""

    def __init__(self, size: int = 6, blocks: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, size)
        self.blocks = nn.ModuleList(Block(size) for _ in range(blocks))
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.norm.requires_grad_(False)
        self.register_buffer("scale", torch.full((size,), 1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out

    def training_step(self, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(tokens).flatten(0, 1), tokens.flatten())

    def hidden(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.embedding(tokens)
        return out


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def build(seed: int = 1, **sizes: int) -> Model:
    torch.manual_seed(seed)
    return Model(**sizes)


def tokens(number: int = 8) -> Tensor:
    return torch.randint(0, 7, (number, 4), generator=torch.Generator().manual_seed(2))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten())


def mine(lite: Lite, batch: Tensor) -> Tensor:
    return batch[lite.global_rank :: lite.world_size]


def assert_same(ours: nn.Module, theirs: nn.Module, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-6}
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(whole(a.detach()), b.detach(), msg=lambda text, n=name: f"{n}: {text}", **tolerance)


@contextmanager
def ranks(world: World) -> Iterator[World]:
    torch.manual_seed(0)
    yield world


def lite_of(world: World, strategy: Any = "fsdp", **settings: Any) -> Lite:
    return Lite(accelerator="cpu", devices=world.world_size, strategy=strategy, **settings)


def _trains_like_plain(lite: Lite, steps: int = 3, **setup: Any) -> Any:
    """Train under `lite` and in plain torch; the weights must be equal."""
    model, plain = build(), build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    other = torch.optim.AdamW(plain.parameters(), lr=0.05)
    model, optimizer = lite.setup(model, optimizer, **setup)
    for _ in range(steps):
        optimizer.zero_grad()
        lite.backward(loss_of(model, mine(lite, tokens())))
        optimizer.step()
        other.zero_grad()
        loss_of(plain, tokens()).backward()
        other.step()
    assert_same(model, plain)
    return model


# ---------------------------------------------------------------- units


def blocks_of_lists_are_units(world: World) -> None:
    """Every rank keeps a part of each parameter; blocks are units; shared weights stay shared, frozen ones frozen."""
    with lite_of(world) as lite:
        model = _trains_like_plain(lite)
        assert [isinstance(block, FSDPModule) for block in model.blocks] == [True] * 3
        assert not isinstance(model, FSDPModule)
        assert type(model).__mro__[1] is Model
        assert model.head.weight is model.embedding.weight
        assert not model.norm.weight.requires_grad
        own = sum(p.to_local().numel() for p in model.parameters())
        assert own < 0.7 * sum(p.numel() for p in model.parameters()) or world.world_size == 1
        assert list(model.state_dict()) == list(build().state_dict())


def options_train_alike(world: World) -> None:
    """Every way of choosing units, resharding, recomputing, prefetching and compiling gives the same weights."""
    for options in (
        {"units": {Block}, "reshard_after_forward": False},
        {"units": {"Block", nn.LayerNorm}, "reshard_after_forward": True},
        {"units": lambda module: isinstance(module, (Block, nn.LayerNorm)), "prefetch": 2},
        {"unit_min_numel": 40, "activation_checkpointing": True},
        {"activation_checkpointing": {nn.LayerNorm}, "units": {Block}},
        {"mesh": {"shard": -1}},
    ):
        with lite_of(world, FSDP(**options)) as lite:
            _trains_like_plain(lite)


def units_compile_by_themselves(world: World) -> None:
    """Compiled units give the same weights."""
    with lite_of(world, FSDP(compile={"backend": "eager"})) as lite, warnings.catch_warnings():
        # torch's compiler looks at gathered parameters in a way torch warns of.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        _trains_like_plain(lite)


def hybrid_sharding_trains_alike(world: World) -> None:
    """A mesh of groups shards within each and averages over them."""
    for mesh in ({"replicate": 2, "shard": 2}, {"replicate": -1, "shard": 1}, {"replicate": 1, "shard": 4}):
        with lite_of(world, FSDP(mesh=mesh)) as lite:
            model = _trains_like_plain(lite)
            assert model.head.weight.device_mesh.mesh_dim_names == ("replicate", "shard")
    with lite_of(world, FSDP(mesh={"replicate": 3, "shard": 2})) as lite, pytest.raises(SettingError, match="4 ranks"):
        lite.setup(build())


# ---------------------------------------------------------------- optimizers


def optimizers_are_carried_over(world: World) -> None:
    """Groups, settings and state of an optimizer made, and used, before set-up go on, in one call or in two."""
    for together in (True, False):
        models = [build(), build()]
        optimizers = []
        for model in models:
            decayed = [p for p in model.parameters() if p.dim() > 1]
            others = [p for p in model.parameters() if p.dim() == 1 and p.requires_grad]
            groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.01}]
            optimizers.append(torch.optim.AdamW(groups, lr=0.05, weight_decay=0.0))
            loss_of(model, tokens()).backward()
            optimizers[-1].step()
            optimizers[-1].zero_grad()
        with lite_of(world) as lite:
            (model, plain), (optimizer, other) = models, optimizers
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            if together:
                lite.setup(model, optimizer)
            else:
                lite.setup_module(model)
                lite.setup_optimizers(optimizer)
            assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
            state = optimizer.state[model.head.weight]
            assert isinstance(state["exp_avg"], DTensor)
            assert state["step"].item() == 1
            scheduler_of_other = torch.optim.lr_scheduler.StepLR(other, 1)
            for _ in range(2):
                optimizer.zero_grad()
                other.zero_grad()
                lite.backward(loss_of(model, mine(lite, tokens())))
                loss_of(plain, tokens()).backward()
                for each in (optimizer, other, scheduler, scheduler_of_other):
                    each.step()
            assert_same(model, plain)


def a_new_optimizer_after_setup_works(world: World) -> None:
    """setup_module, then an optimizer of the sharded parameters, then setup_optimizers."""
    with lite_of(world) as lite:
        model, plain = lite.setup_module(build()), build()
        optimizer = lite.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        other = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            other.zero_grad()
            lite.backward(loss_of(model, mine(lite, tokens())))
            loss_of(plain, tokens()).backward()
            optimizer.step()
            other.step()
        assert_same(model, plain)


def ranks_get_rank_zeros_values(world: World) -> None:
    """Ranks that built other values, in parameters or buffers, all go on with those of rank 0."""
    with lite_of(world) as lite:
        model = build(seed=10 + lite.global_rank)
        model.scale.fill_(lite.global_rank)
        expected = build(seed=10)
        lite.setup(model)
        assert_same(model, expected, rtol=0, atol=0)
        assert model.scale.unique().tolist() == [0.0]


def buffers_are_rank_zeros_after_a_step(world: World) -> None:
    """After a step all buffers are rank 0's on every rank, persistent or not, as under torch's own DDP."""
    with lite_of(world) as lite:
        model = Tracking()
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        lite.backward(model(torch.full((4 + lite.global_rank, 3), 1.0 + lite.global_rank)).sum())
        first, *others = buffers_on_ranks(model)
        assert all(ours != theirs for other in others for ours, theirs in zip(first, other, strict=True))
        optimizer.step()
        assert buffers_on_ranks(model) == [first] * lite.world_size


# ---------------------------------------------------------------- the loop


def accumulation_nests(world: World) -> None:
    """no_backward_sync nests in any way; what held before holds after; unequal micro-batches count as they should."""
    with lite_of(world) as lite:
        model, plain = lite.setup(build()), build()
        batch = tokens(12)
        parts = [batch[:2], batch[2:8], batch[8:]]
        with lite.no_backward_sync(model):
            with lite.no_backward_sync(model, enabled=False):
                lite.backward(loss_of(model, mine(lite, parts[0])) * 2)
            lite.backward(loss_of(model, mine(lite, parts[1])) * 6)
        lite.backward(loss_of(model, mine(lite, parts[2])) * 4)
        for part in parts:
            (loss_of(plain, part) * len(part)).backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(whole(ours.grad), theirs.grad, rtol=1e-5, atol=1e-6)


def zeroed_gradients_are_forgotten(world: World) -> None:
    """zero_grad of the optimizer, or the model, drops what was accumulated and not averaged as well."""
    with lite_of(world) as lite:
        model, plain = build(), build()
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for zero in (optimizer, model):
            with lite.no_backward_sync(model):
                lite.backward(loss_of(model, tokens(2)))
            zero.zero_grad()
            lite.backward(loss_of(model, mine(lite, tokens())))
            plain.zero_grad()
            loss_of(plain, tokens()).backward()
            torch.testing.assert_close(whole(model.head.weight.grad), plain.head.weight.grad, rtol=1e-5, atol=1e-6)
            model.zero_grad()


def backwards_in_any_order(world: World) -> None:
    """Two forwards before two backwards, and one graph twice, give the gradients of one process."""

    def two(model: nn.Module, batch: Tensor, backward: Callable[[Tensor], None]) -> None:
        first, second = loss_of(model, batch), model(batch).square().mean()
        backward(first)
        backward(second)

    def twice(model: nn.Module, batch: Tensor, backward: Callable[[Tensor], None]) -> None:
        loss = loss_of(model, batch)
        backward(loss)
        backward(loss)

    with lite_of(world) as lite:
        model, plain = lite.setup(build()), build()
        for step in (two, twice, two):
            step(model, mine(lite, tokens()), lambda loss: lite.backward(loss, retain_graph=True))
            step(plain, tokens(), lambda loss: loss.backward(retain_graph=True))
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                if theirs.grad is not None:
                    torch.testing.assert_close(whole(ours.grad), theirs.grad, rtol=1e-5, atol=1e-6)
            model.zero_grad()
            plain.zero_grad()


def other_methods_and_outputs(world: World) -> None:
    """Marked methods run under the strategy, outputs may be any object; parts called by themselves are refused."""

    @dataclasses.dataclass
    class Out:
        loss: Tensor
        note: str

    class Wrapped(Model):
        def forward(self, batch: Tensor) -> Any:
            return Out(nn.functional.cross_entropy(super().forward(batch).flatten(0, 1), batch.flatten()), "x")

    with lite_of(world) as lite:
        plain = build()
        torch.manual_seed(1)
        model = lite.setup(Wrapped())
        out = model(mine(lite, tokens()))
        assert out.note == "x"
        lite.backward(out.loss)
        loss_of(plain, tokens()).backward()
        torch.testing.assert_close(whole(model.head.weight.grad), plain.head.weight.grad, rtol=1e-5, atol=1e-6)

        model = lite.setup(build(), forward_methods=("training_step",))
        lite.backward(model.training_step(mine(lite, tokens())))
        torch.testing.assert_close(whole(model.head.weight.grad), plain.head.weight.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.hidden(tokens()), plain.hidden(tokens()))
        with pytest.raises(UsageError, match=r"LayerNorm 'norm' was called by itself.*forward_methods"):
            model.norm(torch.ones(2, 6))
        with pytest.raises(UsageError, match=r"Block 'blocks.1' was called by itself"):
            model.blocks[1](torch.ones(2, 6))
        lite.backward(loss_of(model, mine(lite, tokens())))


def evaluations_may_be_uneven(world: World) -> None:
    """Ranks with different numbers of batches evaluate each sample once, and train on; so does one with none."""
    with lite_of(world, FSDP(prefetch=1)) as lite:
        model, optimizer = build(), None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = lite.setup(model, optimizer)
        for number in (1, 3, 5):
            data = tokens(number)
            loader = lite.setup_dataloaders(DataLoader(TensorDataset(data), batch_size=1))
            plain = build()
            plain.load_state_dict({k: whole(v) for k, v in model.state_dict().items()})
            for context in (torch.no_grad(), torch.inference_mode()):
                model.eval()
                total, count = torch.zeros(()), 0
                with context:
                    for (batch,) in loader:
                        total += model(batch).sum()
                        model(batch)
                        count += 1
                assert int(lite.all_reduce(torch.tensor(count), reduce_op="sum")) == number
                seen = lite.all_reduce(total, reduce_op="sum")
                torch.testing.assert_close(seen, plain(data).sum().detach(), rtol=1e-4, atol=1e-4)
            model.train()
            lite.backward(loss_of(model, mine(lite, tokens())))
            optimizer.step()
            optimizer.zero_grad()


def a_failed_forward_is_forgotten(world: World) -> None:
    """After an exception in a forward the next one is right."""
    with lite_of(world) as lite:
        model, plain = lite.setup(build()), build()
        with pytest.raises(IndexError):
            model(torch.full((2, 4), 99))
        lite.backward(loss_of(model, mine(lite, tokens())))
        loss_of(plain, tokens()).backward()
        torch.testing.assert_close(whole(model.head.weight.grad), plain.head.weight.grad, rtol=1e-5, atol=1e-6)


def overflow_in_one_part_skips_everywhere(world: World) -> None:
    """A gradient that overflows in the part of one rank skips the step on all, and halves the scale once."""
    with lite_of(world, precision="16-mixed") as lite:
        model = build()
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        lite.backward(loss_of(model, mine(lite, tokens())))
        optimizer.step()
        before = [whole(p.detach()).clone() for p in model.parameters()]
        optimizer.zero_grad()
        lite.backward(loss_of(model, mine(lite, tokens())))
        if lite.global_rank == 0:
            model.head.weight.grad.to_local()[0, 0] = float("inf")
        assert not torch.isfinite(lite.clip_gradients(model, optimizer, max_norm=1.0))
        optimizer.step()
        for old, new in zip(before, model.parameters(), strict=True):
            assert torch.equal(old, whole(new.detach()))
        scales = lite._hooks.precision_state()["scale"]
        assert lite.all_gather(scales).tolist() == [32768.0] * lite.world_size


def an_optimizer_that_was_not_set_up_steps_on_an_overflow(world: World) -> None:
    """It steps on true gradients, and where they overflow the next backward raises."""
    with lite_of(world, precision="16-mixed") as lite:
        model, plain = lite.setup(build()), build()
        unknown = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):  # accumulated: two backwards without a step are no overflow
            lite.backward(loss_of(model, mine(lite, tokens())))
            loss_of(plain, tokens()).backward()
        torch.testing.assert_close(whole(model.head.weight.grad), plain.head.weight.grad, rtol=0.02, atol=1e-3)
        model.head.weight.grad.to_local().fill_(float("inf"))
        lite.backward(loss_of(model, mine(lite, tokens())))
        lite.backward(loss_of(model, mine(lite, tokens())))
        unknown.step()
        with pytest.raises(OrderError, match="overflowed float16 at loss scale 65536, and an optimizer that was not"):
            lite.backward(loss_of(model, mine(lite, tokens())))


def dtypes_may_differ(world: World) -> None:
    """Parts kept in another dtype are units of their own; one part with two is refused."""

    class Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float()).to(x.dtype)

    model = build().bfloat16()
    for block in model.blocks:
        block.norm = Norm(6)
    model.norm = Norm(6)
    with lite_of(world) as lite:
        lite.setup(model)
        lite.backward(loss_of(model, mine(lite, tokens())).float())
        assert model.blocks[0].norm.weight.grad.dtype is torch.float32
        assert model.blocks[0].up.weight.grad.dtype is torch.bfloat16
        odd = nn.Linear(2, 2)
        odd.bias = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
        with pytest.raises(UnsupportedError, match="one Linear are of torch.bfloat16 and torch.float32"):
            lite.setup(nn.Sequential(odd, nn.Linear(2, 2)))


# ---------------------------------------------------------------- large models


def deferred_models_equal_eager_ones(world: World) -> None:
    """init_module builds without storage; after set-up every value is that of an eager build, on every rank."""
    with lite_of(world) as lite:
        for empty_init in (True, None):
            eager = build(size=64)
            after = torch.rand(1)
            with lite.init_module(empty_init=empty_init):
                model = build(size=64)
            assert torch.equal(torch.rand(1), after)
            assert model.blocks[0].up.weight.is_meta
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model, optimizer = lite.setup(model, optimizer)
            assert_same(model, eager, rtol=0, atol=0)
            assert torch.equal(model.scale, eager.scale)
            assert model.head.weight is model.embedding.weight
            lite.backward(model(mine(lite, tokens())).square().mean())
            optimizer.step()
            assert not torch.equal(whole(model.head.weight.detach()), eager.head.weight)
        with torch.device("meta"):
            unknown = Model()
        with pytest.raises(UnsupportedError, match=r"on the meta device.*lite.init_module\(empty_init=True\)"):
            lite.setup(unknown)


# ---------------------------------------------------------------- state


def checkpoints_go_everywhere(world: World) -> None:
    """Saved whole or in parts by fsdp, loaded by ddp and by fsdp: model and optimizer are equal, and go on alike."""
    folder = os.environ["FSDP_TEST_FOLDER"]
    for form in ("safetensors", "dcp"):
        path = os.path.join(folder, f"{form}-{world.world_size}")
        losses: dict[str, list[float]] = {}
        for number, strategy in enumerate(("fsdp", "ddp", "fsdp", "ddp")):
            with lite_of(world, strategy, checkpoint=form) as lite:
                model = build(seed=1 if number == 0 else 5)
                groups = [{"params": [p for p in model.parameters() if p.dim() > 1]}]
                optimizer = torch.optim.AdamW(groups, lr=0.05)
                model, optimizer = lite.setup(model, optimizer)
                if number == 0:
                    lite.backward(loss_of(model, mine(lite, tokens())))
                    optimizer.step()
                    optimizer.zero_grad()
                else:
                    lite.load(path, {"model": model, "optimizer": optimizer})
                lite.save(path, {"model": model, "optimizer": optimizer})
                content = lite.load(path)
                assert "blocks.0.up.weight" in content["optimizer"]["state"]
                key = f"{number}"
                losses[key] = []
                for _ in range(2):
                    loss = loss_of(model, mine(lite, tokens()))
                    lite.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    losses[key].append(lite.all_reduce(loss.detach()).item())
        for other in losses.values():
            assert other == pytest.approx(losses["0"], rel=1e-5)


def torn_down_models_say_so(world: World) -> None:
    """A model of a job that has ended says what to do instead of failing somewhere in torch."""
    lite = lite_of(world)
    model = lite.setup(build())
    lite.teardown()
    with pytest.raises(OrderError, match="torn down: save it before"):
        model(tokens())


def warns_of_nothing_to_recompute(world: World) -> None:
    """Activation checkpointing that finds no block is told."""
    with lite_of(world, FSDP(activation_checkpointing=True)) as lite, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lite.setup(nn.Linear(2, 2))
    told = [w for w in caught if issubclass(w.category, PlugframeWarning)]
    assert ("finds no block in this Linear" in str(told[0].message)) if world.global_rank == 0 else not told


def norms_with_statistics_work_in_mixed_precision(world: World) -> None:
    """torch's kernels want parameters and running statistics of one dtype: those parameters are not cast."""
    for precision, before in (("bf16-mixed", nn.Identity()), ("16-mixed", nn.Linear(4, 4))):
        with lite_of(world, FSDP(), precision=precision) as lite:
            torch.manual_seed(0)
            model = nn.Sequential(before, nn.BatchNorm1d(4), nn.Linear(4, 1))
            model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
            for _ in range(2):
                lite.backward(model(torch.randn(3, 4)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            statistics = lite.all_gather(model[1].running_mean)
            assert statistics.dtype == torch.float32
            assert all(torch.equal(row, statistics[0]) for row in statistics)
            assert statistics[0].abs().sum() > 0


ALL = (
    blocks_of_lists_are_units,
    options_train_alike,
    units_compile_by_themselves,
    optimizers_are_carried_over,
    a_new_optimizer_after_setup_works,
    ranks_get_rank_zeros_values,
    buffers_are_rank_zeros_after_a_step,
    accumulation_nests,
    zeroed_gradients_are_forgotten,
    backwards_in_any_order,
    other_methods_and_outputs,
    evaluations_may_be_uneven,
    a_failed_forward_is_forgotten,
    overflow_in_one_part_skips_everywhere,
    an_optimizer_that_was_not_set_up_steps_on_an_overflow,
    dtypes_may_differ,
    norms_with_statistics_work_in_mixed_precision,
    deferred_models_equal_eager_ones,
    checkpoints_go_everywhere,
    torn_down_models_say_so,
    warns_of_nothing_to_recompute,
)
FOUR = (hybrid_sharding_trains_alike, blocks_of_lists_are_units, evaluations_may_be_uneven, checkpoints_go_everywhere)


@pytest.fixture(scope="module", params=[1, 2, 4])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = str(tmp_path_factory.mktemp("fsdp"))
    checks = FOUR if request.param == 4 else ALL
    return run_checks(request.param, ranks, checks, timeout_s=150.0, env={"FSDP_TEST_FOLDER": folder})


@pytest.mark.parametrize("name", [check.__name__ for check in dict.fromkeys((*ALL, *FOUR))])
def test_fsdp(outcome: dict[str, str], name: str) -> None:
    """Each check, on one, two or four ranks; see its own docstring."""
    assert not outcome.get(name), outcome[name]


# ---------------------------------------------------------------- without ranks


def test_units_are_found() -> None:
    """auto takes blocks of lists and large parts; what shares weights with the rest belongs to the rest."""
    model = Model()
    assert [type(unit) for unit in find_units(model, "auto", min_numel=10**6)] == [Block] * 3
    assert find_units(model, "auto", min_numel=10**6) == list(model.blocks)[::-1]
    assert model.embedding not in find_units(model, "auto", min_numel=1)
    assert nn.Linear in {type(unit) for unit in find_units(model, "auto", min_numel=1)}
    nested = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert find_units(nested, "auto", min_numel=10**6) == [nested[1], nested[0]]
    assert find_units(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "auto", min_numel=10**6) == []
    model.blocks[2].up.weight = model.blocks[1].up.weight
    assert find_units(model, "auto", min_numel=10**6) == [model.blocks[0]]


def test_units_by_dtype() -> None:
    """Parts of the rarer dtype become units."""
    model = Model().bfloat16()
    model.blocks[0].norm.float()
    units = find_units(model, "auto", min_numel=10**6)
    assert split_dtypes(model, units) == [model.blocks[0].norm]
    assert split_dtypes(Model(), units) == []


def test_policies_follow_the_precision() -> None:
    """Parameters are gathered in the dtype of the arithmetic, gradients summed in that of the parameters."""
    mixed = MixedPrecision("bfloat16").precision_dtypes()
    assert make_policy(None, mixed) == MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    assert make_policy(None, TruePrecision("bfloat16").precision_dtypes()) == MixedPrecisionPolicy()
    over = make_policy({"reduce_dtype": "bfloat16", "cast_forward_inputs": False}, mixed)
    assert over == MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, cast_forward_inputs=False)
    own = MixedPrecisionPolicy(output_dtype=torch.float16)
    assert make_policy(own, mixed) is own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": "blocks"}, "units='blocks' of strategy 'fsdp' must be 'auto', a set of module classes"),
        ({"units": set()}, "must be 'auto', a set"),
        ({"units": {int}}, "must be 'auto', a set"),
        ({"unit_min_numel": 0}, r"FSDP\(unit_min_numel=0\): it is an integer from 1"),
        ({"prefetch": -1}, r"prefetch=-1\): it is an integer from 0"),
        ({"cpu_offload": 1}, r"cpu_offload=1\): it is true or false"),
        ({"mesh": {"shards": 2}}, "write a dict such as .*replicate.*shard"),
        ({"mesh": {"shard": 0}}, "'shard' is a number of ranks, or -1"),
        ({"mesh": {"shard": -1, "replicate": -1}}, "only one axis can be -1"),
        ({"mp_policy": {"param_dtyp": "bfloat16"}}, "has no 'param_dtyp'. Did you mean 'param_dtype'"),
        ({"mp_policy": {"param_dtype": "bf17"}}, "param_dtype='bf17' is not a dtype"),
        ({"mp_policy": 3}, "must be a MixedPrecisionPolicy or a dict"),
        ({"activation_checkpointing": "blocks"}, "must be 'auto', a set"),
        ({"reshard_after_forward": "yes"}, "reshard_after_forward='yes' .* True, False or a number of ranks"),
        ({"compile": "yes"}, "compile='yes' .* True, False or a dict"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    """Each error says what was given and what is allowed."""
    with pytest.raises(SettingError, match=message):
        FSDP(**options)


def test_names_of_unknown_classes_are_refused() -> None:
    """A class that is no part of the model is an error with the closest one."""
    with pytest.raises(SettingError, match=r"names 'Blok', and this Model has no such submodule. Did you mean 'Block'"):
        find_units(Model(), {"Blok"}, min_numel=1)
    with pytest.raises(SettingError, match="names 'Conv2d'"):
        find_units(Model(), {nn.Conv2d}, min_numel=1)


def test_offload_on_the_host_is_refused() -> None:
    """There is nowhere to offload to from the CPU."""
    expected = "cpu_offload=True .* the device is the CPU already: leave it out"
    lite = Lite(accelerator="cpu", devices=1, strategy=FSDP(cpu_offload=True))
    with lite, pytest.raises(UnsupportedError, match=expected):
        lite.setup(nn.Linear(2, 2))


def test_meshes_are_checked() -> None:
    """A mesh is a dict of known axes."""
    check_mesh("fsdp", None, ("shard",))
    check_mesh("fsdp", {"shard": 2}, ("shard",))
    with pytest.raises(SettingError, match="mesh=4 of strategy 'fsdp'"):
        check_mesh("fsdp", 4, ("shard",))  # type: ignore[arg-type]
