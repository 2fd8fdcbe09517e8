"""The strategy tensor_parallel, on real gloo ranks: plans, two-dimensional meshes, loaders, checkpoints."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from plugframe import Lite, SettingError
from plugframe.hooks.world import World
from plugframe_builtins.tensor_parallel.plan import check_plan
from plugframe_builtins.tensor_parallel.strategy import TensorParallel
from ranks import run_checks

PLAN = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}


class Block(nn.Module):
    """A small network with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return out


class Model(nn.Module):
    """Blocks between two layers that no plan splits."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.leave = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.leave(x)
        return out


class Planned(Model):
    """Knows by itself how it is split."""

    tensor_parallel_plan = PLAN


class HuggingFace(Model):
    """Has a plan in the words of Hugging Face's models."""

    _tp_plan: ClassVar[dict[str, str]] = {
        "blocks.*.up": "colwise",
        "blocks.0.down": "rowwise",
        "blocks.1.up": "colwise_rep",
        "blocks.1.down": "rowwise_rep",
        "enter": "colwise_gather_output",
        "leave": "replicate",
    }


class Tied(nn.Module):
    """Scores the next token with the weights of its embedding, as Hugging Face's models may."""

    def __init__(self, plan: dict[str, str], size: int = 8) -> None:
        super().__init__()
        torch.manual_seed(1)
        self._tp_plan = plan
        self.embed, self.mix = nn.Embedding(size, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, size, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.mix(self.embed(tokens))))
        return out


class Around(nn.Module):
    """Has a model with a plan in it, whose attributes it shows, as those of peft do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tied({})
        self._tp_plan = {"embed": "embedding_rowwise"}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def build(cls: type[Model] = Model, seed: int = 1) -> Model:
    torch.manual_seed(seed)
    return cls()


def data(number: int = 8) -> Tensor:
    return torch.randn(number, 5, generator=torch.Generator().manual_seed(2))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


@contextmanager
def ranks(world: World) -> Iterator[World]:
    torch.manual_seed(0)
    yield world


def lite_of(world: World, strategy: Any) -> Lite:
    return Lite(accelerator="cpu", devices=world.world_size, strategy=strategy)


def _split(model: nn.Module, mesh: DeviceMesh) -> None:
    for block in model.blocks:  # type: ignore[union-attr]
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})  # type: ignore[arg-type]


def plans_train_like_plain_torch(world: World) -> None:
    """Weights, norms and losses are those of one process, for each kind of plan and each mesh."""
    meshes = [None, {"tensor": 2, "data": -1}, {"tensor": -1}, {"data": world.world_size}]
    ways = [TensorParallel(plan=PLAN, mesh=mesh) for mesh in meshes]
    ways += [TensorParallel(parallelize=_split), TensorParallel(units={Block}, mesh={"tensor": 2, "data": -1})]
    ways.append(TensorParallel(mesh={"tensor": 2, "data": -1}))
    for strategy in ways:
        cls = Model if strategy.plan or strategy.parallelize else Planned if strategy.units != "auto" else HuggingFace
        model, plain = build(cls), build()
        optimizers = [torch.optim.AdamW(each.parameters(), lr=0.05) for each in (model, plain)]
        with lite_of(world, strategy) as lite:
            if strategy.parallelize:
                with lite.init_module(empty_init=True):
                    model = build(cls)
                optimizers[0] = torch.optim.AdamW(model.parameters(), lr=0.05)
            lite.setup(model, optimizers[0])
            index, count = strategy.strategy_data_shard()
            for part in (slice(0, 4), slice(4, 8), slice(0, 8)):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                batch = data()[part]
                with lite.no_backward_sync(model):
                    lite.backward(loss_of(model, batch[index::count]) * 0.5)
                lite.backward(loss_of(model, batch[index::count]))
                (1.5 * loss_of(plain, batch)).backward()
                norm = lite.clip_gradients(model, optimizers[0], max_norm=0.3)
                torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(plain.parameters(), 0.3), rtol=1e-5, atol=0)
                for optimizer in optimizers:
                    optimizer.step()
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(whole(ours.detach()), theirs.detach(), rtol=1e-5, atol=1e-6)


def split_embeddings_train_like_plain_torch(world: World) -> None:
    """An embedding that is split by rows or columns, tied to a head that is split alike."""
    tokens = torch.arange(8).view(2, 4)
    tied = {"embed": "embedding_rowwise", "head": "colwise_gather_output"}
    for plan in (tied, {"mix": "colwise_rep"}):
        model, plain = Tied(plan), Tied({})
        pairs = [(each, torch.optim.SGD(each.parameters(), lr=0.5, momentum=0.5)) for each in (model, plain)]
        with lite_of(world, "tensor_parallel") as lite:
            lite.setup(*pairs[0])
            assert model.head.weight is model.embed.weight
            for _ in range(3):
                for each, optimizer in pairs:
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(each(tokens).flatten(0, 1), tokens.roll(1).flatten())
                    lite.backward(loss) if each is model else loss.backward()
                    optimizer.step()
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(whole(ours.detach()), theirs.detach(), rtol=1e-5, atol=1e-6)
    for odd, message in (
        (Tied({"embed": "embedding_colwise", "head": "colwise_rep"}), "Split all of its layers along the same dim"),
        (Tied({"mix": "packed_colwise"}), "has 'packed_colwise' for 'mix', a style that .* does not have: pass one"),
        (Around(), "Around._tp_plan is that of another model, and names nothing in this Around: pass one"),
    ):
        with lite_of(world, "tensor_parallel") as lite, pytest.raises(SettingError, match=message):
            lite.setup(odd)


def ranks_of_a_tensor_group_read_the_same_batches(world: World) -> None:
    """The data axis divides the samples; ranks along the tensor axis get equal batches."""
    with lite_of(world, TensorParallel(plan=PLAN, mesh={"data": -1, "tensor": 2})) as lite:
        lite.setup(build())
        loader = lite.setup_dataloaders(DataLoader(TensorDataset(torch.arange(8)), batch_size=2, shuffle=True))
        mine = torch.cat([batch for (batch,) in loader])
        everyone = lite.all_gather(mine)
        for group in range(world.world_size // 2):
            assert torch.equal(everyone[2 * group], everyone[2 * group + 1])
        assert sorted(everyone[::2].flatten().tolist()) == list(range(8))


def checkpoints_go_everywhere(world: World) -> None:
    """A state saved here loads into ddp and back, model and optimizer equal; evaluation is on all ranks alike."""
    path = os.path.join(os.environ["TP_TEST_FOLDER"], f"{world.world_size}")
    after = []
    for number in range(3):
        strategy: Any = "ddp" if number == 1 else TensorParallel(plan=PLAN, mesh={"data": -1, "tensor": 2})
        with lite_of(world, strategy) as lite:
            model = build(seed=1 if number == 0 else 7)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
            lite.setup(model, optimizer)
            if number:
                lite.load(path, {"model": model, "optimizer": optimizer})
            else:
                lite.backward(loss_of(model, data()))
                optimizer.step()
                optimizer.zero_grad()
            lite.save(path, {"model": model, "optimizer": optimizer})
            with torch.no_grad():
                before = loss_of(model, data()).item()
            lite.backward(loss_of(model, data()))
            optimizer.step()
            after.append((before, loss_of(model, data()).item()))
    assert after[1] == pytest.approx(after[0], rel=1e-5)
    assert after[2] == pytest.approx(after[0], rel=1e-5)


def mistakes_are_told(world: World) -> None:
    """No plan, a pattern that fits nothing, half of a shared weight, and a mesh of another size, each in one line."""
    no_plan = r"has no plan to split this Model: pass TensorParallel\(plan="
    with lite_of(world, "tensor_parallel") as lite, pytest.raises(SettingError, match=no_plan):
        lite.setup(build())
    odd_style = build()
    odd_style._tp_plan = {"enter": "local_colwise"}
    with (
        lite_of(world, "tensor_parallel") as lite,
        pytest.raises(SettingError, match="_tp_plan has 'local_colwise' for"),
    ):
        lite.setup(odd_style)
    unknown = TensorParallel(plan={"blocks.*.upp": "colwise"})
    fits_nothing = r"names 'blocks.\*.upp', which matches no submodule of this Model. Did you"
    with lite_of(world, unknown) as lite, pytest.raises(SettingError, match=fits_nothing):
        lite.setup(build())
    tied = build()
    tied.blocks[1].up.weight = tied.blocks[0].up.weight
    one = TensorParallel(plan={"blocks.0.up": "colwise_gather"})
    are_one = "splits a layer whose parameter is shared: 'blocks.0.up.weight' and 'blocks.1.up.weight' are one"
    with lite_of(world, one) as lite, pytest.raises(SettingError, match=are_one):
        lite.setup(tied)
    odd = TensorParallel(plan=PLAN, mesh={"tensor": 3})
    wrong_size = f"does not fit this job's {world.world_size} ranks"
    with lite_of(world, odd) as lite, pytest.raises(SettingError, match=wrong_size):
        lite.setup(build())


ALL = (
    plans_train_like_plain_torch,
    split_embeddings_train_like_plain_torch,
    ranks_of_a_tensor_group_read_the_same_batches,
    checkpoints_go_everywhere,
    mistakes_are_told,
)


@pytest.fixture(scope="module", params=[2, 4])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = str(tmp_path_factory.mktemp("tensor_parallel"))
    return run_checks(request.param, ranks, ALL, timeout_s=120.0, env={"TP_TEST_FOLDER": folder})


@pytest.mark.parametrize("name", [check.__name__ for check in ALL])
def test_tensor_parallel(outcome: dict[str, str], name: str) -> None:
    """Each check, on two and four ranks; see its own docstring."""
    assert not outcome[name], outcome[name]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, 'must be a dict such as {"blocks'),
        ([("a", "colwise")], "must be a dict such as"),
        ({"a": "colwize"}, "has 'colwize' for 'a': write one of 'colwise'.* Did you mean 'colwise'"),
        ({"a": 3}, "has 3 for 'a'"),
    ],
)
def test_wrong_plans_are_refused(plan: Any, message: str) -> None:
    """Each error says what a plan looks like."""
    with pytest.raises(SettingError, match=message):
        check_plan(plan, "plan")
    with pytest.raises(SettingError, match=message):
        TensorParallel(plan=plan)


def test_one_of_plan_and_function() -> None:
    """Two ways to say it are one too many."""
    with pytest.raises(SettingError, match="takes one of plan= and parallelize="):
        TensorParallel(plan=copy.copy(PLAN), parallelize=_split)
    with pytest.raises(SettingError, match="must be f"):
        TensorParallel(parallelize="split")  # type: ignore[arg-type]
