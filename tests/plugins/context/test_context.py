"""Sequence parallelism on gloo ranks: numbers of one process, and what cannot be divided is refused by name."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from context_models import (
    LENGTH,
    WIDTH,
    Block,
    Encoder,
    Masked,
    Model,
    Rotary,
    RotaryBlock,
    angles,
    data,
    loss_of,
)
from context_wrong_models import WRONG
from plugframe import Axis, Lite, Plugin, SettingError, UnsupportedError
from plugframe.base import Strategy
from plugframe.hooks.world import World
from plugframe_builtins.context import ring
from plugframe_builtins.context.axis import SequenceAxis
from plugframe_builtins.context.strategy import ContextParallel
from plugframe_builtins.fsdp.strategy import FSDP
from plugframe_builtins.tensor_parallel.strategy import TensorParallel
from ranks import run_checks

PLAN = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
#: What trains as one process does: model, attention.
MODELS: tuple[tuple[Callable[[], Model], str], ...] = (
    (Model, "all_to_all"),
    (Model, "gather"),
    (Masked, "all_to_all"),
    (Masked, "gather"),
    (Rotary, "all_to_all"),
    (lambda: Rotary(key_heads=1), "all_to_all"),
    (Encoder, "all_to_all"),
    (lambda: Encoder(causal=True), "all_to_all"),
    (Masked, "ring"),
    (lambda: Rotary(key_heads=1), "ring"),
    (Encoder, "ring"),
)


def build(make: Callable[[], Model] = Model, seed: int = 1) -> Model:
    torch.manual_seed(seed)
    return make()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def ranks(world: World) -> Iterator[World]:
    torch.manual_seed(0)
    yield world


def lite_of(strategy: Any, mesh: Any, devices: int, **settings: Any) -> Lite:
    return Lite(accelerator="cpu", devices=devices, strategy=strategy, mesh=mesh, **settings)


def shard_of(lite: Lite) -> tuple[int, int]:
    index, count = lite._hooks.strategy_data_shard()
    return index, count


def trains_alike(lite: Lite, make: Callable[[], Model], tolerance: float) -> Model:
    """Two steps with accumulation and clipping, and one process's; compare losses, norms, gradients and weights."""
    model, plain = build(make), build(make)
    optimizer, its = (torch.optim.AdamW(each.parameters(), lr=0.01) for each in (model, plain))
    lite.setup(model, optimizer)
    index, count = shard_of(lite)
    for part in (slice(0, 4), slice(4, 8)):
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
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            torch.testing.assert_close(
                whole(ours.grad),
                theirs.grad,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, name=name: f"{name} {text}",
            )
        norm = lite.clip_gradients(model, optimizer, max_norm=0.3)
        true = nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        torch.testing.assert_close(norm, true, rtol=tolerance, atol=tolerance)
        optimizer.step()
        its.step()
    model.eval()
    plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, data()), loss_of(plain, data()), rtol=tolerance, atol=tolerance)
    return model


def models_train_like_one_process(world: World) -> None:
    """Learned and rotary positions, grouped keys, masks, torch's encoder: fp32 within 1e-5."""
    for make, attention in MODELS:
        strategy = ["fsdp", ContextParallel(attention=attention)]
        with lite_of(strategy, {"data": 1, "context": 2}, 2) as lite:
            trains_alike(lite, make, 1e-5)


def rings_have_exact_derivatives(world: World) -> None:
    """Outputs are those of torch; with dropout, derivatives are those of differences, in any direction."""
    generator = torch.Generator().manual_seed(3)
    query, direction = (torch.randn(2, 4, LENGTH, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    pairs = [torch.randn(2, 2, LENGTH, size, generator=generator, dtype=torch.float64) for size in (5, 3, 5, 3)]
    mask = torch.rand(2, 1, LENGTH, LENGTH, generator=generator) > 0.4
    mask[0, 0, 2] = False
    bias = torch.randn(LENGTH, LENGTH, generator=generator, dtype=torch.float64)
    with lite_of("ddp+context", {"data": 1, "context": 2}, 2) as lite:
        lite.setup(build())
        group = lite.mesh["context"].get_group()
        axis = SequenceAxis(lite._hooks, group, world.global_rank, 2, torch.device("cpu"))

        def run(step: float, terms: ring.Terms) -> tuple[list[Tensor], Tensor]:
            wholes = (query + step * direction, pairs[0] + step * pairs[2], pairs[1] + step * pairs[3])
            parts = [each.chunk(2, -2)[axis.index].clone().requires_grad_() for each in wholes]
            torch.manual_seed(world.global_rank)
            return parts, ring.attend(axis, parts[0], parts[1], parts[2], terms)

        for given, causal in ((None, True), (mask, False), (bias, False)):
            for dropout in (0.0, 0.3):
                terms = ring.Terms(given, causal, dropout, 0.7)
                parts, out = run(0.0, terms)
                if not dropout:
                    true = F.scaled_dot_product_attention(
                        query, *pairs[:2], given, is_causal=causal, scale=0.7, enable_gqa=True
                    )
                    torch.testing.assert_close(out, true.chunk(2, -2)[axis.index])
                out.square().sum().backward()
                moved = (direction, pairs[2], pairs[3])
                found = sum(
                    (
                        (part.grad * each.chunk(2, -2)[axis.index]).sum()
                        for part, each in zip(parts, moved, strict=True)
                    ),
                    torch.zeros(()),
                )
                apart = (run(1e-6, terms)[1].square().sum() - run(-1e-6, terms)[1].square().sum()) / 2e-6
                sums = [lite.all_reduce(each.detach(), reduce_op="sum") for each in (found, apart)]
                torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-6)


class Between(Model):
    """Scales and adds hidden states between blocks, token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks[0](self.words(tokens) + self.places)
        x = self.blocks[1](x) * self.scale + 0.5 * x
        out: Tensor = self.head(self.norm(self.blocks[2](x)))
        return out


def steps(lite: Lite, model: Any) -> None:
    lite.setup(model)
    lite.backward(loss_of(model, data()))


def wrong_models_are_refused(world: World) -> None:
    """Positions, masks and pools of a part, other attention, and hidden states used between blocks, by name."""
    for make, message in WRONG:
        refused = pytest.raises((UnsupportedError, SettingError), match=message)
        with lite_of("fsdp+context", {"data": 1, "context": 2}, 2) as lite, refused:
            steps(lite, make())


def tokenwise_code_between_blocks_is_right(world: World) -> None:
    """Scaling and residuals between blocks are those of one process."""
    with lite_of("fsdp+context", {"data": 1, "context": 2}, 2) as lite:
        trains_alike(lite, Between, 1e-5)


class Guided(Model):
    """Hidden states and a conditioning that are given, with their gradients."""

    def forward(self, hidden: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        for block in self.blocks:
            hidden = block(hidden, position_embeddings=angles(LENGTH, WIDTH // 4), shift=shift)[0]
        return hidden


def gradients_of_inputs_are_those_of_one_process(world: World) -> None:
    """What the script passes into the blocks has the complete gradient on every rank."""
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(3, length, WIDTH, generator=generator) for length in (LENGTH, 1)]
    found = []
    with lite_of("ddp+context", {"data": 1, "context": 2}, 2) as lite:
        for sets_up in (True, False):
            model = build(lambda: Guided(block=RotaryBlock))
            if sets_up:
                lite.setup(model)
            leaves = [each.clone().requires_grad_() for each in inputs]
            loss = model(*leaves).square().mean()
            (lite.backward if sets_up else torch.Tensor.backward)(loss)
            found.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def recomputed_blocks_are_right(world: World) -> None:
    """Activation checkpointing, with dropout: as without."""
    gradients: list[Tensor] = []
    for strategy in (FSDP(), FSDP(activation_checkpointing=True)):
        with lite_of([strategy, "context"], {"data": 1, "context": 2}, 2) as lite:
            trains_alike(lite, Rotary, 1e-5)
            model = build(lambda: Model(dropout=0.5))
            lite.setup(model)
            torch.manual_seed(3)
            lite.backward(loss_of(model, data()))
            found = torch.cat([whole(p.grad).flatten() for p in model.parameters() if p.grad is not None])
            everyone = lite.all_gather(found)
            assert torch.equal(everyone[0], everyone[1])
            assert torch.equal(*lite.all_gather(torch.rand(4)))
            gradients.append(found)
    torch.testing.assert_close(*gradients)


def tokens_draw_different_numbers(world: World) -> None:
    """Dropout of a rank's tokens is not that of the other rank's, nor that of the step or block before."""
    seen: list[Tensor] = []
    with lite_of("ddp+context", {"data": 1, "context": 2}, 2) as lite:
        model = build(lambda: Model(number=2, dropout=0.5))
        for block in model.blocks:
            cast(Any, block).up.register_forward_hook(lambda *_: seen.append(torch.rand(8)))
        lite.setup(model)
        for _ in range(2):
            seen.clear()
            model(data())
        drawn = lite.all_gather(torch.stack(seen[-2:]))
        assert len({tuple(each.tolist()) for each in drawn.flatten(0, 1)}) == 4
        assert torch.equal(*lite.all_gather(torch.get_rng_state()))
        # Nothing is drawn where nothing is random.
        model = build()
        lite.setup(model)
        before = torch.get_rng_state()
        model(data())
        assert torch.equal(torch.get_rng_state(), before)


def nothing_is_left_behind(world: World) -> None:
    """Classes, torch's function and copies of a model are plain after the job; copies in the job run undivided."""
    original = F.scaled_dot_product_attention
    model = build()
    with lite_of("ddp+context", {"data": 1, "context": 2}, 2) as lite:
        lite.setup(model)
        assert isinstance(model.blocks[0], Block)
        assert isinstance(model.blocks[0], FSDPModule)
        model(data())
        copied = copy.deepcopy(model)
        copied.eval()
        expected = model.eval()(data())
        torch.testing.assert_close(copied(data()), expected)
        state = lite.state_dict(model)
    assert F.scaled_dot_product_attention is original
    if world.global_rank:
        return
    plain = build(seed=5)
    plain.load_state_dict(state)
    torch.testing.assert_close(plain.eval()(data()), expected)


def options_are_told(world: World) -> None:
    """Blocks by path, the check turned off, a list that is not unique, a compiled block, context alone."""
    mesh = {"data": 1, "context": 2}
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"blocks": ["layers.*"]}, r"blocks= of strategy 'context' names 'layers.\*', and Model has no such submodule"),
        ({"attention": "rings"}, "attention"),
        ({"arguments": {"x": "part"}}, "arguments"),
    )
    for option, message in wrong:
        with pytest.raises(SettingError, match=message), lite_of(["ddp", ContextParallel(**option)], mesh, 2) as lite:
            lite.setup(build())
    with lite_of(["ddp", ContextParallel(blocks=["blocks.1", "blocks.2"], check=False)], mesh, 2) as lite:
        trains_alike(lite, Model, 1e-5)
    with lite_of([FSDP(compile={"backend": "eager"}), "context"], mesh, 2) as lite:
        model = build()
        lite.setup(model)
        with pytest.raises(UnsupportedError, match="Block in block 'blocks.0' is compiled"):
            model(data())
    with lite_of("ddp+context", mesh, 2) as lite:
        model = build()
        model.compile(backend="eager")
        with pytest.raises(UnsupportedError, match="Model is compiled"):
            lite.setup(model)
    with pytest.raises(SettingError, match="none of them divides the batch: add 'ddp' or 'fsdp'"):
        lite_of("context", None, 2)


#: What trains as one process does: strategy, mesh, model. With four ranks two heads of keys are gathered.
MIXES: tuple[tuple[Any, Any, Callable[[], Model]], ...] = (
    ("fsdp+context", {"data": 2, "context": 2}, Model),
    (["ddp", ContextParallel(attention="ring")], {"context": 4, "data": 1}, Rotary),
    ("ddp+context", {"data": 2, "context": 2}, Model),
    ("context+fsdp", {"context": 4, "data": -1}, Rotary),
    ("ddp+context", {"context": 4, "data": 1}, Encoder),
    ("fsdp+context", {"replicate": 2, "data": 1, "context": 2}, Masked),
    (["fsdp", "context", TensorParallel(plan=PLAN)], {"data": 1, "context": 2, "tensor": 2}, Model),
    (["ddp", "context", TensorParallel(plan=PLAN)], {"data": 1, "context": 2, "tensor": 2}, Rotary),
)


def mixes_train_like_one_process(world: World) -> None:
    """Two axes of four ranks, beside every strategy that divides the batch: fp32 within 1e-5, bf16 within rounding."""
    for precision, tolerance in (("32-true", 1e-5), ("bf16-mixed", 3e-2)):
        for strategy, mesh, make in MIXES if precision == "32-true" else MIXES[:4]:
            with lite_of(strategy, mesh, 4, precision=precision) as lite:
                trains_alike(lite, make, tolerance)


#: Saved under one, loaded under the next.
WAYS: tuple[tuple[Any, Any], ...] = (
    ("fsdp+context", {"data": 2, "context": 2}),
    ("fsdp", None),
    ("ddp+context", {"data": 2, "context": 2}),
    ("ddp", None),
    ("fsdp+context", {"data": 1, "context": 4}),
)


def checkpoints_go_from_mesh_to_mesh(world: World) -> None:
    """What was saved on a mesh is loaded on the next one, in both formats, and in one process."""
    expected: list[Tensor] = []
    for checkpoint in ("safetensors", "dcp"):
        path = os.path.join(os.environ["CONTEXT_FOLDER"], checkpoint)
        for number, (strategy, mesh) in enumerate(WAYS):
            with lite_of(strategy, mesh, 4, checkpoint=checkpoint) as lite:
                model = build(seed=1 if number == 0 else 7)
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
                lite.setup(model, optimizer)
                if number:
                    lite.load(path, {"model": model, "optimizer": optimizer}, rng=False)
                else:
                    index, count = shard_of(lite)
                    lite.backward(loss_of(model, data()[index::count]))
                    optimizer.step()
                    optimizer.zero_grad()
                lite.save(path, {"model": model, "optimizer": optimizer})
                with torch.no_grad():
                    expected.append(loss_of(model, data()))
    torch.testing.assert_close(torch.stack(expected), expected[0].expand(len(expected)), rtol=1e-5, atol=1e-5)


class Foreign(Strategy):
    """Divides the batch, and averages over its own axis only."""

    plugin = Plugin(factory=f"{__name__}:Foreign", axes=(Axis("data", samples=True),))


def who_averages_is_told(world: World) -> None:
    """A strategy that does not know the axis is refused by name."""
    with pytest.raises(SettingError, match="does not average gradients over the axis 'context'"):
        lite_of([Foreign(), "context"], {"data": 2, "context": 2}, 4)


TWO = (
    models_train_like_one_process,
    rings_have_exact_derivatives,
    wrong_models_are_refused,
    tokenwise_code_between_blocks_is_right,
    gradients_of_inputs_are_those_of_one_process,
    recomputed_blocks_are_right,
    tokens_draw_different_numbers,
    nothing_is_left_behind,
    options_are_told,
)


def three_axes_train_like_one_process(world: World) -> None:
    """Data, context and tensor axes of two ranks each; three axes to average over are refused."""
    mesh = {"data": 2, "context": 2, "tensor": 2}
    with lite_of(["fsdp", "context", TensorParallel(plan=PLAN)], mesh, 8) as lite:
        trains_alike(lite, Model, 1e-5)
    three = {"replicate": 2, "data": 2, "context": 2}
    message = "averages gradients over two axes at most, and context, replicate and data of mesh= have several ranks"
    with lite_of("fsdp+context", three, 8) as lite, pytest.raises(UnsupportedError, match=message):
        lite.setup(build())


FOUR = (mixes_train_like_one_process, checkpoints_go_from_mesh_to_mesh, who_averages_is_told)
EIGHT = (three_axes_train_like_one_process,)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(2, ranks, TWO, timeout_s=240.0, env={"CONTEXT_FOLDER": str(tmp_path_factory.mktemp("context"))})


@pytest.mark.parametrize("name", [check.__name__ for check in TWO])
def test_context_on_two_ranks(of_two: dict[str, str], name: str) -> None:
    """Every check passes on two ranks."""
    assert of_two[name] == "", of_two[name]


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(4, ranks, FOUR, timeout_s=240.0, env={"CONTEXT_FOLDER": str(tmp_path_factory.mktemp("context"))})


@pytest.mark.parametrize("name", [check.__name__ for check in FOUR])
def test_context_on_four_ranks(of_four: dict[str, str], name: str) -> None:
    """Every check passes on four ranks."""
    assert of_four[name] == "", of_four[name]


@pytest.mark.slow
def test_context_on_eight_ranks() -> None:
    """Three axes at once."""
    for name, error in run_checks(8, ranks, EIGHT, timeout_s=240.0).items():
        assert error == "", f"{name}: {error}"
