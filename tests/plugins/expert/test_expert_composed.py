"""Expert parallelism beside tensor parallelism and pipelines, on gloo ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from expert_checks import build, lite_of, ranks, shard_of, trains_alike
from expert_models import WIDTH, Capacity, Loop, Model, Skipping, Sorted, Wide, data, loss_of
from plugframe import Lite, PlugframeError
from plugframe.hooks.world import World
from plugframe_builtins.pipeline.strategy import Pipeline
from plugframe_builtins.tensor_parallel.strategy import TensorParallel
from ranks import run_checks

PLAN = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}
FOUR = [["enter"], ["layers.0"], ["layers.1"], ["leave"]]
STAGES = [["enter", "layers.0"], ["layers.1", "leave"]]
TENSOR, PIPELINE = {"data": 1, "expert": 2, "tensor": 2}, {"data": 1, "expert": 2, "pipeline": 2}
KINDS: dict[str, tuple[Any, str | None]] = {
    "loop": (Loop, None),
    "skipping": (Skipping, None),
    "sorted": (Sorted, "grouped"),
    "capacity": (Capacity, "batched"),
}


def model_of(kind: str) -> Model:
    made = Model(*KINDS[kind], layer=Wide)
    made.tensor_parallel_plan, made.pipeline_plan = PLAN, STAGES
    return made


class Returning(Model):
    """A model that returns its loss."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) - 1).square().mean()


MIXES: tuple[tuple[Any, Any, str, str], ...] = (
    ("ddp+expert+tensor_parallel", TENSOR, "loop", "32-true"),
    ("fsdp+expert+tensor_parallel", TENSOR, "sorted", "32-true"),
    ("fsdp+expert+tensor_parallel", TENSOR, "skipping", "bf16-mixed"),
    ("fsdp+expert+pipeline", PIPELINE, "loop", "32-true"),
    ("ddp+expert+pipeline", PIPELINE, "capacity", "32-true"),
    ("ddp+expert+pipeline", PIPELINE, "skipping", "bf16-mixed"),
)


def mixes_train_like_one_process(world: World) -> None:
    """Losses, gradients, norms and weights: fp32 within 1e-5, bf16 within its own."""
    for strategy, mesh, kind, precision in MIXES:
        with lite_of(strategy, mesh, precision=precision) as lite:
            trains_alike(lite, lambda kind=kind: model_of(kind), 1e-5 if precision == "32-true" else 3e-2)  # type: ignore[misc]


def schedules_run_within_the_call(world: World) -> None:
    """With a model that returns its loss: 1f1b, and interleaved with two stages a rank."""
    for pipeline in (Pipeline(split=STAGES), Pipeline(stages=4, split=FOUR, schedule="interleaved", micro_batches=2)):
        with lite_of(["fsdp", "expert", pipeline], PIPELINE) as lite:
            model, plain = build(Returning), build(Returning)
            optimizer, its = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, plain))
            lite.setup(model, optimizer)
            index, count = shard_of(lite)
            for part in (slice(0, 8), slice(8, 16)):
                optimizer.zero_grad()
                its.zero_grad()
                loss, expected = model(data()[part][index::count]), plain(data()[part])
                lite.backward(loss)
                expected.backward()
                optimizer.step()
                its.step()
                torch.testing.assert_close(lite.all_reduce(loss.detach()), expected.detach(), rtol=1e-5, atol=1e-5)


#: Saved under one, loaded under the next.
WAYS: tuple[tuple[Any, Any], ...] = (
    ("fsdp+expert+pipeline", PIPELINE),
    ("ddp+expert+tensor_parallel", TENSOR),
    ("fsdp", None),
    ("ddp+expert+pipeline", PIPELINE),
)


def checkpoints_go_from_mesh_to_mesh(world: World) -> None:
    """What was saved on a mesh is loaded on the next one, in both formats."""
    for checkpoint in ("safetensors", "dcp"):
        found: list[Tensor] = []
        path = os.path.join(os.environ["EXPERT_FOLDER"], checkpoint)
        for number, (strategy, mesh) in enumerate(WAYS):
            with lite_of(strategy, mesh, checkpoint=checkpoint) as lite:
                model = build(lambda: model_of("loop"), seed=7 if number else 1)
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
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
                    found.append(loss_of(model, data()))
        torch.testing.assert_close(torch.stack(found), found[0].expand(len(found)), rtol=1e-5, atol=1e-5)


class Uneven(Wide):
    """Draws a number of its own on each rank of a tensor group, for what the experts get."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.distributed.get_rank() * torch.arange(WIDTH))


def trains(lite: Lite, make: Any) -> None:
    model = build(make)
    lite.setup(model)
    for _ in range(2):
        lite.backward(loss_of(model, data()[:8]))


def wrong_uses(world: World) -> None:
    """What would hang, or be wrong, is refused by name."""
    within = TensorParallel(plan={**PLAN, "layers.*.mixture.experts.*.down": "rowwise_rep"})
    sequence = TensorParallel(plan={**PLAN, "layers.*.norm": "sequence"})
    cut = Pipeline(split=["layers.0.mixture.experts.1"])
    bubble = Pipeline(stages=4, split=FOUR, schedule="zero_bubble")
    cases: Sequence[tuple[Any, Any, Any, str]] = (
        (["ddp", "expert", within], TENSOR, wide, "experts.*is split by another strategy|no multiple of"),
        (["ddp", "expert", sequence], TENSOR, wide, "gets a DTensor"),
        (["ddp", "expert", "tensor_parallel"], TENSOR, lambda: planned(Uneven), "get other tokens on ranks that read"),
        (["fsdp", "expert", cut], PIPELINE, wide, "experts 'layers.0.mixture.experts' are cut into several"),
        (["fsdp", "expert", bubble], PIPELINE, wide, "schedule='zero_bubble' .* divided experts exchange"),
    )
    for strategy, mesh, make, message in cases:
        with lite_of(strategy, mesh) as lite, pytest.raises(PlugframeError, match=message):
            trains(lite, make)
    with lite_of("fsdp+expert+pipeline", PIPELINE) as lite:
        model = build(lambda: model_of("loop"))
        lite.setup(model)
        # One of the pipelines has a batch that two micro-batches do not divide.
        own = data()[: 7 if world.global_rank in (0, 2) else 8]
        with pytest.raises(PlugframeError, match="cut their batches into 1 and 2 micro-batches, and their experts"):
            model(own)


def wide() -> Model:
    return Model(layer=Wide)


def planned(layer: Any) -> Model:
    made = Model(layer=layer)
    made.tensor_parallel_plan = PLAN
    return made


def other_shapes_are_fine(world: World) -> None:
    """Batches of other sizes, and evaluation, beside a pipeline; a mixture in a pipeline of its own too."""
    for strategy, mesh in (("fsdp+expert+pipeline", PIPELINE), ("pipeline", None)):
        own: Any = strategy if mesh else Pipeline(split=FOUR)
        with lite_of(own, mesh) as lite:
            model, plain = build(lambda: model_of("loop")), build(lambda: model_of("loop"))
            lite.setup(model)
            model.eval()
            index, count = shard_of(lite)
            with torch.no_grad():
                for size in (8, 4, 8):
                    torch.testing.assert_close(model(data()[:size]), plain(data()[:size]), rtol=1e-5, atol=1e-5)
            rows = data()[:8][index::count]
            torch.testing.assert_close(model(rows), plain(rows), rtol=1e-5, atol=1e-5)


CHECKS = (wrong_uses,)
CHECKS2 = (
    mixes_train_like_one_process,
    schedules_run_within_the_call,
    checkpoints_go_from_mesh_to_mesh,
    other_shapes_are_fine,
    wrong_uses,
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = str(tmp_path_factory.mktemp("expert"))
    return run_checks(4, ranks, CHECKS, timeout_s=240.0, env={"EXPERT_FOLDER": folder})


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_experts_beside_other_axes(outcome: dict[str, str], name: str) -> None:
    """Every check passes on four ranks."""
    assert outcome[name] == "", outcome[name]
