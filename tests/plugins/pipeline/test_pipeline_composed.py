"""Pipelines beside other strategies, on real gloo ranks: losses, gradients, norms and states of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset

from pipeline_models import VOCABULARY, WIDTH, Layers, Twins, build, numbers
from plugframe import Axis, Lite, PlugframeWarning, Plugin, SettingError, UnsupportedError
from plugframe.base import Strategy
from plugframe.errors import OutOfSyncError
from plugframe.hooks.world import World
from plugframe_builtins.context.strategy import ContextParallel
from plugframe_builtins.fsdp.strategy import FSDP
from plugframe_builtins.pipeline.stand_in import OtherParameter
from plugframe_builtins.pipeline.strategy import Pipeline
from plugframe_builtins.tensor_parallel.strategy import TensorParallel
from ranks import run_checks

DATA, TENSOR = {"data": 2, "pipeline": 2}, {"tensor": 2, "pipeline": 2}


@contextmanager
def ranks(world: World) -> Iterator[World]:
    torch.manual_seed(0)
    yield world


class Block(nn.Module):
    """Attention and a network behind it, each with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixed = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        parts = (each.view(rows, tokens, 2, -1).transpose(1, 2) for each in self.mixed(self.norm(x)).chunk(3, -1))
        attended = scaled_dot_product_attention(*parts, is_causal=True)
        x = x + attended.transpose(1, 2).reshape(rows, tokens, width)
        return x + self.down(torch.tanh(self.up(x)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A language model with a parameter of its own; it returns its loss if it gets targets."""

    tensor_parallel_plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}  # noqa: RUF012
    context_parallel_blocks = ("blocks.*",)

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.scale = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.ones(WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.tokens(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits if targets is None else _loss(logits, targets)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def returned(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """The loss that a model returns."""
    loss: Tensor = model(x, y)
    return loss


def from_outputs(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """The loss of a model's outputs."""
    return _loss(model(x), y)


def tokens(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(VOCABULARY, (16, 5), generator=generator)
    return drawn[:, :-1], drawn[:, 1:]


def lite_on(strategy: Any, mesh: Any, num_ranks: int = 4, **settings: Any) -> Lite:
    return Lite(accelerator="cpu", devices=num_ranks, strategy=strategy, mesh=mesh, **settings)


def complete(model: nn.Module, read: Callable[[Any], Any]) -> dict[str, Any]:
    """Return what `read` returns of the parameters of this rank's stages, gathered."""
    own = {name: p for name, p in model.named_parameters() if not isinstance(p, OtherParameter)}
    found = {name: read(parameter) for name, parameter in own.items()}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    """Return the complete gradients of this rank's stages."""
    return complete(model, lambda parameter: parameter.grad)


def pair(lite: Lite, cls: Callable[[], nn.Module], tolerance: float = 1e-5) -> Twins:
    """Return a model that was set up, and its plain twin, each with an optimizer."""
    model, plain = build(cls), build(cls)
    made = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (model, plain)]
    lite.setup(model, made[0])
    return Twins(lite, model, plain, made, tolerance)


def step(both: Twins, loss_of: Callable[[Any, Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    """Make one step of both of two accumulated losses; compare losses, gradients and norms."""
    lite, (ours, theirs) = both.lite, both.optimizers
    index, count = lite._hooks.strategy_data_shard()
    ours.zero_grad()
    theirs.zero_grad()
    with lite.no_backward_sync(both.model):
        lite.backward(loss_of(both.model, x[index::count], y[index::count]) * 0.5)
    loss = loss_of(both.model, x[index::count], y[index::count])
    lite.backward(loss)
    expected = loss_of(both.plain, x, y)
    (0.5 * loss_of(both.plain, x, y) + expected).backward()  # type: ignore[no-untyped-call]
    both.close(lite.all_reduce(loss.detach()), expected.detach())
    true = {name: parameter.grad for name, parameter in both.plain.named_parameters()}
    for name, gradient in gradients_of(both.model).items():
        assert gradient is not None
        both.close(gradient, true[name], name)
    norm = lite.clip_gradients(both.model, ours, max_norm=0.1)
    assert norm is not None
    both.close(norm, nn.utils.clip_grad_norm_(both.plain.parameters(), 0.1))
    ours.step()
    theirs.step()


def several(schedule: str = "interleaved", stages: int = 4) -> Pipeline:
    return Pipeline(schedule=schedule, stages=stages)


#: What trains as one process does: strategy, mesh, and the loops.
MIXES: list[tuple[Any, Any, tuple[Any, ...]]] = [
    ("fsdp+pipeline", DATA, (returned, from_outputs)),
    ("ddp+tensor_parallel+pipeline", TENSOR, (returned, from_outputs)),
    ("ddp+context+pipeline", {"data": 1, "context": 2, "pipeline": 2}, (returned,)),
    ([FSDP(units={"Block"}, activation_checkpointing=True), Pipeline(schedule="gpipe")], DATA, (returned,)),
    (["fsdp", several()], DATA, (returned,)),
    (["fsdp", several("zero_bubble")], {"replicate": 2, "data": 1, "pipeline": 2}, (returned,)),
    (["fsdp", "tensor_parallel", several()], TENSOR, (returned,)),
    ("fsdp+pipeline", {"data": 4, "pipeline": 1}, (returned,)),
]


def mixes_train_like_one_process(world: World) -> None:
    """Losses, gradients, norms, weights and states are those of one process: fp32 within 1e-5, bf16 within rounding."""
    for precision, tolerance in (("32-true", 1e-5), ("bf16-mixed", 3e-2)):
        for strategy, mesh, loops in MIXES if precision == "32-true" else MIXES[:3]:
            with lite_on(strategy, mesh, precision=precision) as lite:
                both = pair(lite, Decoder, tolerance)
                assert isinstance(both.model, Decoder)
                for number, loss_of in enumerate(loops if precision == "32-true" else loops[:1]):
                    step(both, loss_of, *tokens(number))
                weights = both.plain.state_dict()
                for name, value in complete(both.model, lambda parameter: parameter.detach()).items():
                    both.close(value, weights[name], name)
                if len(loops) > 1:
                    both.compare()


class Unused(Layers):
    """Its last layer runs only for positive inputs, and another one never."""

    def __init__(self) -> None:
        super().__init__()
        self.layers.append(nn.Linear(6, 6))
        self.layers.append(nn.Linear(6, 6))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        for layer in self.layers[:-2]:
            x = layer(x)
        if y is not None and bool(y[0, 0] > 0):
            x = self.layers[-2](x)
        return x.square().mean()


def gradients_are_averaged_after_they_are_scaled(world: World) -> None:
    """Losses that each replica weighs, parameters unused on some or all of them, hooks, and gradients that are dropped.

    A parameter that no rank used has no gradient, as in one process.
    """
    with lite_on(["fsdp", Pipeline(micro_batches=2)], DATA) as lite:
        both = pair(lite, Unused)
        index, count = lite._hooks.strategy_data_shard()
        assert count == 2
        x, y = numbers(8)
        y[:4], y[4:] = y[:4].abs(), -y[4:].abs()
        seen: list[Any] = []
        for name, parameter in both.model.named_parameters():
            if name == "layers.0.0.weight" and not isinstance(parameter, OtherParameter):
                parameter.register_hook(lambda gradient: seen.append(gradient.shape))
        with lite.no_backward_sync(both.model):
            lite.backward(both.model(x[:4], y[:4]))
        both.optimizers[0].zero_grad()
        lite.backward(both.model(x[4 * index :][:4], y[4 * index :][:4]) * (index + 1))
        (both.plain(x[:4], y[:4]) / 2 + both.plain(x[4:], y[4:])).backward()
        true = {name: parameter.grad for name, parameter in both.plain.named_parameters()}
        for name, gradient in gradients_of(both.model).items():
            assert (gradient is None) == (true[name] is None), name
            if gradient is not None:
                both.close(gradient, true[name], name)
        assert seen in ([], [torch.Size([6, 6])])
        with lite.no_backward_sync(both.model):
            lite.backward(both.model(x[:4], y[:4]))
        if world.global_rank:
            both.optimizers[0].step()
        else:
            with pytest.warns(PlugframeWarning, match=r"step\(\) leaves out gradients accumulated under no_backward_s"):
                both.optimizers[0].step()


def models_without_storage_and_several_models(world: World) -> None:
    """Parameters made without storage have rank 0's values, in an optimizer made before too; two models in turns."""
    with lite_on("fsdp+pipeline", DATA) as lite:
        torch.manual_seed(1 + world.global_rank)
        with lite.init_module(empty_init=True):
            model = Decoder()
        plain = build(Decoder)
        made = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (model, plain)]
        lite.setup(model, made[0])
        pairs = [Twins(lite, model, plain, made), pair(lite, Layers)]
        pairs[0].compare()
        step(pairs[0], returned, *tokens(0))
        step(pairs[1], returned, *numbers(8))
        pairs[0].compare()


class Failing(Layers):
    """Fails when it is told to, in its last stage."""

    fails = False

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        out: Tensor = self.layers(x)
        if self.fails:
            raise ValueError("told to")
        return out if y is None else (out - y).square().mean()


def calls_without_gradients_and_after_failures(world: World) -> None:
    """The first call under inference_mode, uneven numbers of batches per replica, a failed call; then a step."""
    with lite_on("fsdp+pipeline", DATA) as lite:
        both = pair(lite, Failing)
        loader = lite.setup_dataloaders(DataLoader(TensorDataset(*numbers(9)), batch_size=3))
        counts = []
        for mode in (torch.inference_mode, torch.no_grad):
            both.model.eval()
            counts.append(0)
            for x, y in loader:
                with mode():
                    both.close(both.model(x), both.plain(x).detach())
                    both.model(x, y)
                counts[-1] += len(x)
            both.model.train()
        assert {int(each) for each in lite.all_gather(torch.tensor(counts[0]))} == {4, 5}
        assert all(isinstance(p, (DTensor, OtherParameter)) for p in both.model.parameters())
        both.model.fails = True
        with pytest.raises((ValueError, UnsupportedError), match="told to"):
            both.model(*numbers(6))
        both.model.fails = False
        x, y = numbers(8)
        step(both, returned, x, y)
        both.model.load_state_dict({name: value.clone() for name, value in both.plain.state_dict().items()})
        both.compare()
        wrong = {name: value + world.global_rank for name, value in both.plain.state_dict().items()}
        with pytest.raises(OutOfSyncError, match=r"load_state_dict\(\) of a sharded model got other values"):
            both.model.load_state_dict(wrong)


class Foreign(Strategy):
    """Shards in a way of its own."""

    plugin = Plugin(factory=f"{__name__}:Foreign", provides=("sharded",), axes=(Axis("data", samples=True),))


def what_does_not_fit_is_refused(world: World) -> None:
    """Options without effect, foreign ways to shard, and plans that fit no stage or one of them only, on all ranks."""
    for option, value in (("reshard_after_forward", True), ("prefetch", 1), ("mp_policy", {"param_dtype": "bfloat16"})):
        refused = rf"{option}=.* of strategy 'fsdp' has no effect beside 'pipeline'"
        with pytest.raises(SettingError, match=refused), lite_on([FSDP(**{option: value}), "pipeline"], DATA) as lite:
            lite.setup(build())
    foreign = "does not know how Foreign shards a model, and cannot have it shard stages: use 'fsdp\\+pipeline'"
    with pytest.raises(UnsupportedError, match=foreign), lite_on([Foreign(), "pipeline"], DATA) as lite:
        lite.setup(build())
    for plan, message in (
        ({"layers.9.*": "colwise"}, r"names 'layers.9.\*', which matches no submodule"),
        ({"layers.7.0": "colwise"}, "splits 'layers.7.0' colwise over 2 ranks, and its out_features=5 is no multiple"),
    ):
        with lite_on(["ddp", TensorParallel(plan=plan), "pipeline"], TENSOR) as lite:
            model = build()
            model.layers[7] = nn.Sequential(nn.Linear(6, 5))
            with pytest.raises(SettingError, match=message):
                lite.setup(model)
    missing = r"names 'blocks.9', and Decoder has no such submodule"
    context = ["ddp", ContextParallel(blocks=["blocks.9"]), "pipeline"]
    with lite_on(context, MIXES[2][1]) as lite, pytest.raises(SettingError, match=missing):
        lite.setup(build(Decoder))


ALL = (
    mixes_train_like_one_process,
    gradients_are_averaged_after_they_are_scaled,
    models_without_storage_and_several_models,
    calls_without_gradients_and_after_failures,
    what_does_not_fit_is_refused,
)


@pytest.fixture(scope="module")
def outcome() -> dict[str, str]:
    return run_checks(4, ranks, ALL, timeout_s=240.0)


@pytest.mark.parametrize("name", [check.__name__ for check in ALL])
def test_composed_pipelines(outcome: dict[str, str], name: str) -> None:
    """Each check, on four ranks; see its own docstring."""
    assert not outcome[name], outcome[name]


def three_axes_train_like_one_process(world: World) -> None:
    """Shards, split layers or sequences, and stages, on eight ranks."""
    for strategy, mesh in (
        ("fsdp+tensor_parallel+pipeline", {"data": 2, "tensor": 2, "pipeline": 2}),
        ("fsdp+context+pipeline", {"data": 2, "context": 2, "pipeline": 2}),
    ):
        with lite_on(strategy, mesh, 8) as lite:
            both = pair(lite, Decoder)
            for seed in range(2):
                step(both, returned, *tokens(seed))
            both.compare()


@pytest.mark.slow
def test_three_axes() -> None:
    """Three axes, on eight ranks; see the check."""
    found = run_checks(8, ranks, [three_axes_train_like_one_process], timeout_s=240.0)
    assert not found["three_axes_train_like_one_process"], found
