"""The strategy pipeline, on real gloo ranks: losses, gradients and states of one process, in every schedule."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from pipeline_models import (
    GPT,
    Block,
    Checkpointed,
    Derived,
    Encoder,
    Layers,
    Noisy,
    Recurrent,
    Scored,
    Sign,
    Summed,
    Twins,
    build,
    lite_of,
    numbers,
    pipelines,
    text,
    twins,
)
from plugframe.hooks.world import World
from plugframe_builtins.pipeline.axis import make_axis
from plugframe_builtins.pipeline.stand_in import OtherParameter
from plugframe_builtins.pipeline.strategy import Pipeline
from ranks import run_checks


@contextmanager
def ranks(world: World) -> Iterator[World]:
    torch.manual_seed(0)
    yield world


def every_schedule_trains_like_one_process(world: World) -> None:
    """A model that returns its loss: losses, norms, weights and optimizer states, accumulated and clipped."""
    for _, strategy in pipelines(world.world_size):
        with lite_of(world, strategy) as lite:
            both = twins(lite)
            # The last batches are uneven: cut into fewer micro-batches.
            for number, size in enumerate((8, 6, 5, 1)):
                x, y = numbers(size, seed=number)
                both.step(lambda model, x=x, y=y: model(x, y), micro=1 + number % 2)
            both.compare()


def outputs_train_like_one_process(world: World) -> None:
    """A model that returns its outputs, with the loss in the loop."""
    for strategy in (Pipeline(schedule="gpipe", micro_batches=4), Pipeline()):
        with lite_of(world, strategy) as lite:
            both = twins(lite)
            for number, size in enumerate((8, 5, 4)):
                x, y = numbers(size, seed=number)
                both.step(lambda model, x=x, y=y: mse_loss(model(x), y))
            both.step(lambda model, x=x, y=y: (model(x) * model(y)).sum())  # two calls in one graph
            both.compare()


def a_language_model_trains_like_one_process(world: World) -> None:
    """Glue between blocks, a mask beside their input, a parameter and a buffer of the model itself, both loops."""
    starts = ["blocks.2", "blocks.3", "norm"]
    stages = [["tokens", "blocks.0"], ["blocks.1"], ["blocks.[23]"], ["blocks.[45]", "norm", "head"]]
    for strategy in (Pipeline(split=starts), Pipeline(split=stages, micro_batches=4), Pipeline(schedule="gpipe")):
        with lite_of(world, strategy) as lite:
            both = twins(lite, GPT)
            for seed in range(3):
                tokens, targets = text(seed=seed)
                both.step(lambda model, a=tokens, b=targets: model(a, b))
            if strategy.schedule == "gpipe":
                both.step(
                    lambda model, a=tokens, b=targets: cross_entropy(model(a)["logits"].flatten(0, 1), b.flatten())
                )
            both.compare()
            with torch.no_grad():
                ours, theirs = both.model(tokens), both.plain(tokens)
            both.close(ours["logits"], theirs["logits"])
            assert torch.equal(ours["last"], theirs["last"])
            assert ours["name"] == "gpt"


def bf16_trains_like_one_process(world: World) -> None:
    """bf16-mixed in every schedule, within what bfloat16 rounds; weights stay float32."""
    for name, strategy in pipelines(world.world_size)[1:5]:
        with lite_of(world, strategy, precision="bf16-mixed") as lite:
            both = twins(lite, GPT if strategy.stages is None else Layers, tolerance=2e-2)
            for seed in range(2):
                x, y = text(seed=seed) if strategy.stages is None else numbers(seed=seed)
                both.step(lambda model, x=x, y=y: model(x, y), micro=1)
            assert all(p.dtype == torch.float32 for p in both.model.parameters()), name
            both.compare()


def evaluation_is_on_every_rank(world: World) -> None:
    """Outputs and losses without gradients, for any batch size, in eval() and in training mode."""
    for strategy in (
        Pipeline(),
        Pipeline(schedule="1f1b"),
        Pipeline(schedule="interleaved", stages=2 * world.world_size),
    ):
        with lite_of(world, strategy) as lite:
            model = build()
            plain = copy.deepcopy(model)
            model = lite.setup(model)
            loader = lite.setup_dataloaders(DataLoader(TensorDataset(*numbers(11)), batch_size=4, shuffle=True))
            seen = 0
            for mode in (torch.no_grad, torch.inference_mode):
                for x, y in loader:
                    model.train(bool(seen % 2))
                    seen += len(x)
                    with mode():
                        out, loss = model(x), model(x, y)
                    torch.testing.assert_close(out, plain(x).detach())
                    torch.testing.assert_close(loss, plain(x, y).detach())
                    everyone = lite.all_gather(out)
                    assert all(torch.equal(everyone[0], each) for each in everyone)
            assert seen == 2 * 11


def checkpoints_go_everywhere(world: World) -> None:
    """A state of a pipeline loads into one process and back, in both formats, optimizer states and all."""
    folder = os.environ["PIPELINE_TEST_FOLDER"]
    other = Pipeline(schedule="interleaved", stages=2 * world.world_size)
    for kind in ("dcp", "safetensors"):
        path = os.path.join(folder, f"{world.world_size}-{kind}")
        x, y = numbers()
        after = []
        for number, strategy in enumerate((Pipeline(), "ddp", other, "fsdp", Pipeline(split=_split(world)))):
            with lite_of(world, strategy, checkpoint=kind) as lite:
                model = build(seed=1 if number == 0 else 7)
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
                lite.setup(model, optimizer)
                if number:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        lite.load(path, {"model": model, "optimizer": optimizer})
                else:
                    lite.backward(model(x, y))
                    optimizer.step()
                    optimizer.zero_grad()
                lite.save(path, {"model": model, "optimizer": optimizer})
                with torch.no_grad():
                    before = model(x, y).item()
                lite.backward(model(x, y))
                optimizer.step()
                after.append((before, model(x, y).item()))
        for each in after[1:]:
            assert each == pytest.approx(after[0], rel=1e-5)


def _split(world: World) -> list[str]:
    return [f"layers.{number}" for number in range(1, world.world_size)]


def frozen_parts_and_groups_train_like_one_process(world: World) -> None:
    """Several parameter groups; the first stage frozen, then the last; parameters frozen and thawed between steps."""
    for frozen in ((0, 1, 2, 3), (7,), ()):

        def groups(model: Any, frozen: tuple[int, ...] = frozen) -> Any:
            for number in frozen:
                model.layers[number].requires_grad_(False)
            held = list(model.parameters())
            return [{"params": held[::2], "lr": 0.02}, {"params": held[1::2], "weight_decay": 0.1}]

        for schedule in ("1f1b", "interleaved", "gpipe", *(["zero_bubble"] if not frozen else [])):
            with lite_of(world, Pipeline(schedule=schedule)) as lite:
                both = twins(lite, groups=groups)
                for thawed in (False, True):
                    for model in (both.model, both.plain):
                        model.layers[3].requires_grad_(thawed)
                        model.layers[0].requires_grad_(thawed)
                    if not (schedule == "zero_bubble" and not thawed):
                        x, y = numbers()
                        both.step(lambda model, x=x, y=y: model(x, y))
                    if schedule == "gpipe":
                        both.step(lambda model, x=x, y=y: mse_loss(model(x), y))
                both.compare()


def unusual_models_train_like_one_process(world: World) -> None:
    """Activation checkpointing, recurrent layers, torch's encoder, and a loss that is a sum over samples."""
    for cls in (Checkpointed, Recurrent, Encoder, Summed):
        for schedule in ("gpipe", "1f1b") if cls is Checkpointed else ("1f1b",):
            with lite_of(world, Pipeline(schedule=schedule, micro_batches=4)) as lite:
                both = twins(lite, cls)
                for seed in range(3):
                    x, y = numbers(seed=seed)
                    both.step(lambda model, x=x, y=y: model(x, y))
                if cls is Checkpointed and schedule == "gpipe":
                    both.step(lambda model, x=x, y=y: mse_loss(model(x), y))
                both.compare()


def losses_beside_outputs_train_like_one_process(world: World) -> None:
    """A loss within a dict is averaged over the micro-batches; plain values are those of the batch."""
    with lite_of(world, Pipeline(micro_batches=4)) as lite:
        both = twins(lite, Scored)
        for seed in range(3):
            x, y = numbers(seed=seed)
            both.step(lambda model, x=x, y=y: model(x, y)["loss"])
            both.step(lambda model, x=x, y=y: model(x, y)["loss"] + model(x, y)["out"].square().sum())
        both.compare()
        with torch.no_grad():
            ours, theirs = both.model(x, y), both.plain(x, y)
        assert list(ours) == list(theirs)
        assert (ours["width"], ours["positive"]) == (6, True)
        both.close(ours["loss"], theirs["loss"])


def random_numbers_are_resumed_and_keep_ranks_in_step(world: World) -> None:
    """Stages draw different numbers, equal in a resumed run; outside of the model all ranks draw the same."""
    path = os.path.join(os.environ["PIPELINE_TEST_FOLDER"], f"noisy-{world.world_size}")
    x, y = numbers()
    ends = []
    for resumed in (False, True):
        with lite_of(world, Pipeline(micro_batches=4)) as lite:
            lite.seed_everything(3)
            model, optimizer = build(Noisy), None
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            lite.setup(model, optimizer)
            state = {"model": model, "optimizer": optimizer}
            if resumed:
                lite.load(path, state)
            losses = []
            for step in range(4):
                if resumed and step < 2:
                    continue
                if step == 2 and not resumed:
                    lite.save(path, state)
                optimizer.zero_grad()
                loss = model(x, y)
                lite.backward(loss)
                optimizer.step()
                losses.append(loss.item())
            drawn = lite.all_gather(torch.rand(3))
            assert all(torch.equal(drawn[0], each) for each in drawn)
            ends.append((losses[-2:], lite.state_dict(model, all_ranks=True)))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())


def other_optimizers_train_like_one_process(world: World) -> None:
    """Optimizers derived from torch's, of a user's own, and made after set-up; their state is saved complete."""
    x, y = numbers()
    for make in (lambda p: Derived(p, lr=0.1, momentum=0.9), lambda p: Sign(p, {"lr": 0.01})):
        with lite_of(world, Pipeline()) as lite:
            model = build()
            plain = copy.deepcopy(model)
            model = lite.setup_module(model)
            both = Twins(lite, model, plain, [make(each.parameters()) for each in (model, plain)])
            lite.setup_optimizers(both.optimizers[0])
            for _ in range(3):
                both.step(lambda model: model(x, y))
            both.compare()


def two_models_train_in_turns(world: World) -> None:
    """Each model has its own stages; gradients do not mix."""
    with lite_of(world, Pipeline(micro_batches=4)) as lite:
        pairs = [twins(lite), twins(lite, GPT)]
        for seed in range(2):
            x, y = numbers(seed=seed)
            tokens, targets = text(seed=seed)
            pairs[0].step(lambda model, x=x, y=y: model(x, y))
            pairs[1].step(lambda model, a=tokens, b=targets: model(a, b))
        for both in pairs:
            both.compare()


def a_model_without_storage_gets_the_first_ranks_values(world: World) -> None:
    """Under init_module(empty_init=True), and of differently seeded ranks; a stage holds nothing of the others."""
    expected = build(GPT).state_dict()
    for empty in (True, False):
        with lite_of(world, Pipeline()) as lite:
            torch.manual_seed(1 + (0 if empty else world.global_rank))
            with lite.init_module(empty_init=empty):
                model = GPT()
            model = lite.setup(model)
            found = lite.state_dict(model, all_ranks=True)
            assert all(torch.equal(found[name], value) for name, value in expected.items())
            held = [p.untyped_storage().nbytes() for p in _blocks(model) if p.untyped_storage().nbytes() > 4]
            assert len(held) < len(_blocks(model))


def _blocks(model: nn.Module) -> list[Any]:
    with torch._C.DisableTorchFunctionSubclass():
        return [p for part in model.modules() if isinstance(part, Block) for p in part.parameters()]


class Replicated(Pipeline):
    """Two pipelines, on the halves of the data."""

    def _make_axis(self, context: Any) -> Any:
        mesh = init_device_mesh("cpu", (2, context.world.world_size // 2), mesh_dim_names=("data", "pipeline"))
        self.data = mesh.get_group("data")
        return make_axis(context, mesh, "pipeline", (mesh.get_local_rank("data"), 2))


def pipelines_may_be_replicated(world: World) -> None:
    """On an axis of a mesh, with gradients averaged over the other one by somebody else, and one checkpoint."""
    path = os.path.join(os.environ["PIPELINE_TEST_FOLDER"], "replicated")
    strategy = Replicated(micro_batches=2)
    with lite_of(world, strategy) as lite:
        both = twins(lite)
        index, count = strategy.strategy_data_shard()
        x, y = numbers(seed=4)
        for _ in range(2):
            for optimizer in both.optimizers:
                optimizer.zero_grad()
            lite.backward(both.model(x[index::count], y[index::count]))
            both.plain(x, y).backward()
            for parameter in _own(both.model):
                dist.all_reduce(parameter.grad, dist.ReduceOp.AVG, group=strategy.data)
            norm = lite.clip_gradients(both.model, both.optimizers[0], max_norm=0.1)
            assert norm is not None
            both.close(norm, nn.utils.clip_grad_norm_(both.plain.parameters(), 0.1))
            for optimizer in both.optimizers:
                optimizer.step()
        both.compare()
        lite.save(path, {"model": both.model, "optimizer": both.optimizers[0]})
    with lite_of(world, Pipeline()) as lite:
        again = twins(lite)
        lite.load(path, {"model": again.model, "optimizer": again.optimizers[0]})
        again.plain.load_state_dict(both.plain.state_dict())
        again.optimizers[1].load_state_dict(both.optimizers[1].state_dict())
        again.compare()


def _own(model: nn.Module) -> list[Any]:
    return [p for p in model.parameters() if not isinstance(p, OtherParameter)]


#: What depends on how many stages there are between the first and the last one.
FOUR = (
    every_schedule_trains_like_one_process,
    a_language_model_trains_like_one_process,
    checkpoints_go_everywhere,
    pipelines_may_be_replicated,
)
TWO = (
    outputs_train_like_one_process,
    bf16_trains_like_one_process,
    evaluation_is_on_every_rank,
    frozen_parts_and_groups_train_like_one_process,
    unusual_models_train_like_one_process,
    losses_beside_outputs_train_like_one_process,
    random_numbers_are_resumed_and_keep_ranks_in_step,
    other_optimizers_train_like_one_process,
    two_models_train_in_turns,
    a_model_without_storage_gets_the_first_ranks_values,
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    env = {"PIPELINE_TEST_FOLDER": str(tmp_path_factory.mktemp("pipeline"))}
    found = run_checks(2, ranks, TWO, timeout_s=240.0, env=env)
    return found | run_checks(4, ranks, FOUR, timeout_s=240.0, env=env)


@pytest.mark.parametrize("name", [check.__name__ for check in (*TWO, *FOUR)])
def test_pipeline(outcomes: dict[str, str], name: str) -> None:
    """Each check, on two or four ranks; see its own docstring."""
    assert not outcomes[name], outcomes[name]
