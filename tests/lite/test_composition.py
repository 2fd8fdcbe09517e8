"""Composed strategies on four gloo ranks: numbers of one process, checkpoints from mesh to mesh, outside packages."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from plugframe import (
    Axis,
    Lite,
    PlugframeWarning,
    Plugin,
    PluginContractError,
    SettingError,
    UnsupportedError,
    hookimpl,
)
from plugframe.base import Strategy
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins.ddp.strategy import DDP
from plugframe_builtins.fsdp.strategy import FSDP
from plugframe_builtins.tensor_parallel.strategy import TensorParallel
from plugframe_builtins.torch_collective.collective import TorchCollective
from ranks import run_checks

PLAN = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
TWO = {"data": 2, "tensor": 2}


class Block(nn.Module):
    """A small network with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return out


class Model(nn.Module):
    """Blocks between two layers that no plan splits, with a parameter that is used outside of them."""

    tensor_parallel_plan = PLAN
    pipeline_plan = (("enter", "blocks.0"), ("blocks.1", "leave"))

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x) * self.scale
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.leave(x)
        return out


#: What trains as one process does: strategy, mesh, and whether its numbers are exact.
MIXES: list[tuple[Any, Any]] = [
    ("fsdp+tensor_parallel", TWO),
    ("ddp+tensor_parallel", TWO),
    ("tensor_parallel+fsdp", {"tensor": 4}),
    ("ddp+tensor_parallel", {"data": -1, "tensor": 1}),
    ("fsdp+tensor_parallel", {"replicate": 2, "data": 1, "tensor": 2}),
    (["fsdp", TensorParallel(plan=PLAN)], TWO),
    ([TensorParallel(plan=PLAN), FSDP(units={Block}, reshard_after_forward=False)], TWO),
    ("tensor_parallel", TWO),
    ("fsdp", {"replicate": 2, "data": 2}),
    ("fsdp", {"shard": 4}),
    ("ddp", {"data": 4}),
]


class Chain(nn.Sequential):
    """Layers one after the other."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        layers = [layer for size in (5, 6, 6, 6) for layer in (nn.Linear(size, 6), nn.Tanh())]
        super().__init__(*layers, nn.Linear(6, 3))


def build(seed: int = 1) -> Model:
    torch.manual_seed(seed)
    return Model()


def data(number: int = 16) -> Tensor:
    return torch.randn(number, 5, generator=torch.Generator().manual_seed(2))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def ranks(world: World) -> Iterator[World]:
    torch.manual_seed(0)
    yield world


def lite_of(strategy: Any, mesh: Any, **settings: Any) -> Lite:
    return Lite(accelerator="cpu", devices=4, strategy=strategy, mesh=mesh, **settings)


def shard_of(lite: Lite) -> tuple[int, int]:
    index, count = lite._hooks.strategy_data_shard()
    return index, count


def _train(
    lite: Lite, model: Any, optimizer: Any, plain: Any, its: Any, tolerance: float, *, compare: bool = True
) -> None:
    """Three steps of both with accumulation and clipping; compare losses, gradients, norms and weights."""
    index, count = shard_of(lite)
    for part in (slice(0, 8), slice(8, 16), slice(0, 16)):
        optimizer.zero_grad()
        its.zero_grad()
        batch = data()[part]
        with lite.no_backward_sync(model):
            lite.backward(loss_of(model, batch[index::count]) * 0.5)
        loss = loss_of(model, batch[index::count])
        lite.backward(loss)
        expected = loss_of(plain, batch)
        (0.5 * loss_of(plain, batch) + expected).backward()
        torch.testing.assert_close(lite.all_reduce(loss.detach()), expected.detach(), rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True) if compare else ():
            torch.testing.assert_close(whole(ours.grad), theirs.grad, rtol=tolerance, atol=tolerance)
        norm = lite.clip_gradients(model, optimizer, max_norm=0.3)
        true = nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        torch.testing.assert_close(norm, true, rtol=tolerance, atol=tolerance)
        optimizer.step()
        its.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True) if compare else ():
        torch.testing.assert_close(whole(ours.detach()), theirs.detach(), rtol=tolerance, atol=tolerance)


def mixes_train_like_one_process(world: World) -> None:
    """Losses, gradients, norms, weights are those of one process: fp32 within 1e-5, bf16 within its rounding."""
    for precision, tolerance in (("32-true", 1e-5), ("bf16-mixed", 3e-2)):
        for number, (strategy, mesh) in enumerate(MIXES if precision == "32-true" else MIXES[:2]):
            model, plain = build(), build()
            # torch plans every operation on every shape anew for a mesh: the fewer of them, the cheaper.
            make = torch.optim.AdamW if number < 2 else torch.optim.SGD
            optimizer, its = (make(each.parameters(), lr=0.01) for each in (model, plain))
            with lite_of(strategy, mesh, precision=precision) as lite:
                lite.setup(model, optimizer)
                assert isinstance(model, Model)
                _train(lite, model, optimizer, plain, its, tolerance)


PIPES = {"data": 2, "pipeline": 2}


def pipelines_have_replicas(world: World) -> None:
    """Stages on one axis, samples on the other, with and without ddp by name: the numbers of one process."""
    for strategy, precision, tolerance in (
        ("ddp+pipeline", "32-true", 1e-5),
        ("pipeline", "32-true", 1e-5),
        ("ddp+pipeline", "bf16-mixed", 3e-2),
    ):
        model, plain = Chain(), Chain()
        plain.load_state_dict(model.state_dict())
        optimizer, its = (torch.optim.AdamW(each.parameters(), lr=0.01) for each in (model, plain))
        with lite_of(strategy, PIPES, precision=precision) as lite:
            lite.setup(model, optimizer)
            assert shard_of(lite) == (world.global_rank % 2, 2)
            _train(lite, model, optimizer, plain, its, tolerance, compare=False)
            found = lite.state_dict(model, all_ranks=True)
            for name, value in plain.state_dict().items():
                torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)
            with lite.no_backward_sync(model):
                lite.backward(loss_of(model, data()[:8]))
            if world.global_rank:
                optimizer.step()
            else:
                with pytest.warns(PlugframeWarning, match="were accumulated under no_backward_sync.* the replicas div"):
                    optimizer.step()


def norms_of_any_order(world: World) -> None:
    """The largest gradient, the sum of magnitudes, and infinite gradients are those of the full model."""
    for strategy in ("fsdp+tensor_parallel", "ddp+tensor_parallel"):
        with lite_of(strategy, TWO) as lite:
            model, plain = build(), build()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            lite.setup(model, optimizer)
            index, count = shard_of(lite)
            lite.backward(loss_of(model, data()[index::count]))
            loss_of(plain, data()).backward()
            for order in (float("inf"), 1.0, 3.0):
                norm = lite.clip_gradients(model, optimizer, max_norm=1e6, norm_type=order)
                true = nn.utils.clip_grad_norm_(plain.parameters(), 1e6, order)
                torch.testing.assert_close(norm, true, rtol=1e-5, atol=1e-6)
            gradient: Any = next(p for p in model.parameters() if isinstance(p, DTensor)).grad
            gradient.to_local().fill_(float("inf"))
            with pytest.raises(RuntimeError, match="non-finite"):
                lite.clip_gradients(model, optimizer, max_norm=1.0)


def the_mesh_is_the_users_too(world: World) -> None:
    """lite.mesh has named dimensions, ranks along the tensor axis read the same samples, and all are read once."""
    with lite_of("fsdp+tensor_parallel", TWO) as lite:
        lite.setup(build())
        assert lite.mesh.mesh_dim_names == ("replicate", "data", "tensor")
        assert lite.mesh["tensor"].size() == 2
        assert shard_of(lite) == (world.global_rank // 2, 2)
        loader = lite.setup_dataloaders(DataLoader(TensorDataset(torch.arange(8)), batch_size=2, shuffle=True))
        everyone = lite.all_gather(torch.cat([batch for (batch,) in loader]))
        assert torch.equal(everyone[0], everyone[1])
        assert torch.equal(everyone[2], everyone[3])
        assert sorted(everyone[::2].flatten().tolist()) == list(range(8))
        # Dropout must agree along the tensor axis, and differ along the data axis.
        lite.seed_everything(3, per_rank=True)
        drawn = lite.all_gather(torch.rand(4))
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])


#: Saved under one, loaded under the next, in both formats.
WAYS: list[tuple[Any, Any]] = [
    ("fsdp+tensor_parallel", TWO),
    ("ddp+tensor_parallel", TWO),
    ("fsdp+tensor_parallel", {"tensor": 4}),
    ("fsdp", {"replicate": 2, "data": 2}),
    ("ddp", None),
    ("fsdp+tensor_parallel", {"data": 4, "tensor": 1}),
    ("ddp+tensor_parallel", {"data": 1, "tensor": 4}),
    ("ddp+pipeline", {"data": 2, "pipeline": 2}),
    ("fsdp+pipeline", {"data": 2, "pipeline": 2}),
    ("ddp+tensor_parallel+pipeline", {"data": 1, "tensor": 2, "pipeline": 2}),
    ("fsdp", None),
]


def checkpoints_go_from_mesh_to_mesh(world: World) -> None:
    """What was saved on a mesh is loaded on the next one, in both formats, and trains on alike."""
    for checkpoint, make in (("safetensors", torch.optim.AdamW), ("dcp", torch.optim.SGD)):
        options: Any = {"lr": 0.05} if make is torch.optim.AdamW else {"lr": 0.5, "momentum": 0.9}
        losses: list[float] = []
        path = os.path.join(os.environ["COMPOSITION_FOLDER"], checkpoint)
        for number, (strategy, mesh) in enumerate(WAYS):
            with lite_of(strategy, mesh, checkpoint=checkpoint) as lite:
                model = build(seed=1 if number == 0 else 7)
                optimizer = make(model.parameters(), **options)
                lite.setup(model, optimizer)
                index, count = shard_of(lite)
                if number:
                    lite.load(path, {"model": model, "optimizer": optimizer}, rng=False)
                else:
                    lite.backward(loss_of(model, data()[index::count]))
                    optimizer.step()
                    optimizer.zero_grad()
                lite.save(path, {"model": model, "optimizer": optimizer})
                lite.backward(loss_of(model, data()[index::count]))
                optimizer.step()
                with torch.no_grad():
                    losses.append(loss_of(model, data()).item())
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


class Noting(Strategy):
    """An outside strategy: it works on blocks, over an axis of its own, beside any other."""

    plugin = Plugin(factory=f"{__name__}:Noting", divides="blocks", axes=(Axis("twin"),))

    def __init__(self) -> None:
        self.seen: list[Any] = []

    @hookimpl
    def strategy_parallelize(self, module: nn.Module) -> None:
        assert self.context.mesh is not None
        self.seen += [self.context.axes, self.context.mesh["twin"].size(), type(module)]

    @hookimpl
    def strategy_teardown(self) -> None:
        self.seen.append("torn down")


def strangers_compose(world: World) -> None:
    """Neither knows the other: an outside strategy beside fsdp, ddp and tensor_parallel, three axes at once."""
    for strategy in ("fsdp", "ddp"):
        noting = Noting()
        model, plain = build(), build()
        optimizer, its = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, plain))
        with lite_of([strategy, noting, TensorParallel(plan=PLAN)], {"data": 1, "twin": 2, "tensor": 2}) as lite:
            lite.setup(model, optimizer)
            _train(lite, model, optimizer, plain, its, 1e-5)
        assert noting.seen == [("twin",), 2, Model, "torn down"]


class Apart(TorchCollective):
    """A collective on a process group of its own, which is not torch's default one."""

    plugin = Plugin(factory=f"{__name__}:Apart", provides=("process-group",))
    foreign = False

    @hookimpl
    def collective_setup(self, context: Context) -> None:
        super().collective_setup(context)
        self._apart = dist.new_group(backend="gloo")

    @hookimpl
    def collective_process_group(self) -> Any:
        return self._apart

    @hookimpl
    def collective_new_group(self, ranks: Sequence[int]) -> Any:
        return tuple(ranks) if self.foreign else super().collective_new_group(ranks)


def meshes_are_on_the_groups_of_the_collective(world: World) -> None:
    """A collective whose group is not torch's default one has meshes of its own groups, for jobs and strategies."""
    for strategy, mesh in (("fsdp+tensor_parallel", TWO), (FSDP(mesh={"replicate": 2, "shard": 2}), None)):
        model, plain = build(), build()
        optimizer, its = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, plain))
        with lite_of(strategy, mesh, collective=Apart()) as lite:
            lite.setup(model, optimizer)
            made: Any = next(p for p in model.parameters() if isinstance(p, DTensor))
            assert made.device_mesh.get_group(0) is not dist.group.WORLD
            _train(lite, model, optimizer, plain, its, 1e-5)
    foreign = Apart()
    foreign.foreign = True
    refused = r"process groups of torch, and collective_new_group\(\) of collective 'Apart' returns a tuple"
    with (
        lite_of("fsdp+tensor_parallel", TWO, collective=foreign) as lite,
        pytest.raises(UnsupportedError, match=refused),
    ):
        lite.launch()


class Forgetting(Strategy):
    """An outside strategy that has axes and leaves the others out."""

    plugin = Plugin(factory=f"{__name__}:Forgetting", axes=(Axis("data", samples=True),))


def mistakes_are_told(world: World) -> None:
    """Options without effect, a mesh given twice, strategies left out, and a job without a mesh, each in one line."""
    left_out = r"Forgetting .* set a Model up without 'tensor_parallel': it has axes, so it must call context.parallel"
    with lite_of([Forgetting(), "tensor_parallel"], TWO) as lite, pytest.raises(PluginContractError, match=left_out):
        lite.setup(build())
    with lite_of("fsdp+tensor_parallel", TWO) as lite:
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lite.setup(model, optimizer)
        for order in (0.0, -float("inf")):
            with pytest.raises(SettingError, match="defined for orders above 0"):
                lite.clip_gradients(model, optimizer, max_norm=1.0, norm_type=order)
    with pytest.raises(SettingError, match="bucket_cap_mb=5 of strategy 'ddp' has no effect beside another strategy"):
        lite_of([DDP(bucket_cap_mb=5), "tensor_parallel"], TWO)
    with pytest.raises(SettingError, match="prefetch=1 of strategy 'tensor_parallel' has no effect beside another"):
        lite_of(["fsdp", TensorParallel(plan=PLAN, prefetch=1)], TWO)
    twice = r"mesh=\{'shard': 4\} of strategy 'fsdp', and mesh= of the job"
    with lite_of(FSDP(mesh={"shard": 4}), {"data": 4}) as lite, pytest.raises(SettingError, match=twice):
        lite.setup(build())
    with lite_of("ddp", None) as lite, pytest.raises(Exception, match="has no mesh: pass mesh= to Lite, or combine"):
        print(lite.mesh)


ALL = (
    mixes_train_like_one_process,
    pipelines_have_replicas,
    norms_of_any_order,
    the_mesh_is_the_users_too,
    checkpoints_go_from_mesh_to_mesh,
    strangers_compose,
    meshes_are_on_the_groups_of_the_collective,
    mistakes_are_told,
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = str(tmp_path_factory.mktemp("composition"))
    return run_checks(4, ranks, ALL, timeout_s=240.0, env={"COMPOSITION_FOLDER": folder})


@pytest.mark.parametrize("name", [check.__name__ for check in ALL])
def test_composed_strategies(outcome: dict[str, str], name: str) -> None:
    """Every check passes on four ranks."""
    assert outcome[name] == "", outcome[name]
