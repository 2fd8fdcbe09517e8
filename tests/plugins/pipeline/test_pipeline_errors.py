"""What the strategy pipeline refuses, by name: on real ranks, and before there are any."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from pipeline_models import GPT, Layers, build, lite_of, numbers
from plugframe import SettingError, UnsupportedError
from plugframe.errors import OrderError, OutOfSyncError, UsageError
from plugframe.hooks.world import World
from plugframe_builtins.pipeline.cut import balanced_split, check_split, make_cut
from plugframe_builtins.pipeline.cut_check import CutCheck
from plugframe_builtins.pipeline.micro_batches import cut_batch
from plugframe_builtins.pipeline.strategy import Pipeline
from ranks import run_checks


@contextmanager
def ranks(world: World) -> Iterator[World]:
    torch.manual_seed(0)
    yield world


class Masked(Layers):
    """Its loss is a mean over some of the samples."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is not None
        chosen = y[:, 0] > 0
        return (self.layers(x) - y).square().mean(1)[chosen].mean()


class Skipping(Layers):
    """Passes what the first layer computes to the last one."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        first = out = self.layers[0](x)
        for layer in self.layers[1:-1]:
            out = layer(out)
        return mse_loss(self.layers[-1](out + first), y)


class Late(Layers):
    """Its result depends on a layer of the first stage."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return mse_loss(self.layers(x), y) + self.layers[0][0].weight.square().mean()


class Backwards(Layers):
    """Calls its layers in the opposite order."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return mse_loss(x, y)


class Normed(Layers):
    """Normalises over a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers.insert(1, nn.BatchNorm1d(6))


class Mixing(Layers):
    """Its outputs depend on other samples."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        out: Tensor = self.layers(x)
        return out - out.mean(0)


class Scored(Layers):
    """Returns a sum over samples beside its outputs."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        out = self.layers(x)
        return {"loss": (out - y).square().sum(), "out": out}


class Transposed(Layers):
    """Returns outputs without a row per sample."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        out: Tensor = self.layers(x)
        return out.T


class Held(Layers):
    """Returns an object."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.layers(x), object()


def _raises(world: World, cls: Callable[[], nn.Module], kind: type[Exception], message: str, **options: Any) -> None:
    with lite_of(world, Pipeline(micro_batches=4, **options)) as lite:
        model = lite.setup(build(cls))
        # Ranks that wait for the one that found it raise too, with its words.
        with pytest.raises((kind, UnsupportedError), match=message):
            model(*numbers())


def models_that_cannot_be_cut_are_named(world: World) -> None:
    """Each raises on every rank at the first call, before a step."""
    _raises(world, Masked, UnsupportedError, "it is no mean or sum over the samples.* use micro_batches=1")
    _raises(
        world, Skipping, UnsupportedError, r"'layers.7', in stage 1, is called with a tensor that depends on what 'la"
    )
    _raises(world, Late, UnsupportedError, "depends on parameter 'layers.0.0.weight' of stage 0")
    _raises(world, Backwards, UnsupportedError, "calls 'layers.7', of stage 1, before the modules of stage 0")
    _raises(world, Normed, UnsupportedError, "BatchNorm1d 'layers.1' normalises over the samples of a batch")
    _raises(world, Mixing, UnsupportedError, "outputs of this Mixing for a batch differ from those for its 4 micro")
    _raises(world, Scored, UnsupportedError, "outputs of this Scored for a batch differ")
    _raises(world, Transposed, UnsupportedError, r"returns a tensor of shape \(6, 2\) for a micro-batch of 2 samples")
    _raises(world, Held, UnsupportedError, "returns a object, which strategy 'pipeline' cannot send")


def calls_that_cannot_be_cut_are_named(world: World) -> None:
    """Outputs under 1f1b, inputs with gradients, other batches per rank, tensors without a row per sample."""
    x, y = numbers()
    with lite_of(world, Pipeline(schedule="1f1b")) as lite:
        model = lite.setup(build())
        with pytest.raises(
            UnsupportedError, match="schedule='1f1b' runs backwards between forwards.* return it, as in"
        ):
            model(x)
        with pytest.raises(UnsupportedError, match="is called with a tensor that requires a gradient"):
            model(x.clone().requires_grad_(), y)
        with pytest.raises(UnsupportedError, match=r"tensors of 8 and of 3 rows \(shape \(3, 6\)\)"):
            model(x, y[:3])
        with torch.no_grad():
            model(x)
        with pytest.raises(UnsupportedError, match="called with a batch of 8 samples and a list of as many values"):
            model(x, [0] * 8)
        with pytest.raises(UnsupportedError, match="is called with a set, which strategy 'pipeline' cannot cut into"):
            model(x, {1})
    with lite_of(world, Pipeline()) as lite:
        model = lite.setup(build())
        with pytest.raises(OutOfSyncError, match="Ranks 0 and 1 call the model with different batches"):
            model(x + world.global_rank, y)
        loss = model(x, y)
        lite.backward(loss, retain_graph=True)
        with pytest.raises(UsageError, match="was differentiated before, and under strategy 'pipeline' it can be once"):
            lite.backward(loss)


def other_stages_are_not_read(world: World) -> None:
    """Parameters of other stages are not copied, saved, read or added to a loss; loops over all of them work."""
    x, y = numbers()
    with lite_of(world, Pipeline()) as lite:
        model = build()
        optimizer = torch.optim.AdamW(model.parameters())
        lite.setup(model, optimizer)
        names = [name for name, _ in model.named_parameters()]
        assert list(model.state_dict()) == names == list(build().state_dict())
        assert sum(p.numel() for p in model.parameters()) == 8 * 42
        assert {p.device for p in model.parameters()} == {torch.device("cpu")}
        for read in (
            lambda: copy.deepcopy(model),
            lambda: pickle.dumps(model),
            lambda: torch.save(model.state_dict(), io.BytesIO()),
        ):
            with pytest.raises(UnsupportedError, match=r"of stage \d cannot be (copied|saved)"):
                read()
        with pytest.raises(UnsupportedError, match=r"needs values that this rank does not have: parameter"):
            sum(p.norm().item() for p in model.parameters())
        with pytest.raises(UnsupportedError, match="The loss depends on parameter"):
            lite.backward(model(x, y) + sum(p.square().sum() for p in model.parameters()))
        lite.backward(model(x, y))
        with pytest.raises(UnsupportedError, match=r"the gradient of parameter .* for norms use lite.clip_gradients"):
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        nn.utils.clip_grad_value_(model.parameters(), 1.0)
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
        optimizer.step()
        with pytest.raises(UnsupportedError, match="the optimizer's state of parameter"):
            torch.save(optimizer.state_dict(), io.BytesIO())
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad(set_to_none=False)
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        model.layers[0].extra = nn.Linear(2, 2)
        with pytest.raises(OrderError, match="'layers.0.extra.weight' of this Layers came after"):
            model(x, y)


def wrong_settings_are_named(world: World) -> None:
    """Cuts and schedules that do not fit the model or the ranks, each in one line."""
    for options, message in (
        ({"split": ["layers.44"]}, "names 'layers.44', which is no submodule of this Layers. Did you mean"),
        ({"split": ["layers.2", "layers.4"]}, "cuts this Layers into 3 stages, and there are to be 2"),
        ({"split": [["layers.[0-3]"], ["layers.[3-7]"]]}, "puts 'layers.3' into stage 0 and into stage 1"),
        ({"split": [["layers.[0-3]"], ["layers.[4-6]"]]}, "puts 'layers.7.0' into no stage"),
        ({"split": [["layers.[0-3]"], ["layer.*"]]}, "names 'layer..', which matches no submodule"),
    ):
        with lite_of(world, Pipeline(**options)) as lite, pytest.raises(SettingError, match=message):
            lite.setup(build())
    for options, message in (
        ({"stages": 3}, "stages=3 is no multiple of the 2 ranks"),
        ({"stages": 4}, "gives each several stages, which 'interleaved' and 'zero_bubble' run"),
        ({"schedule": "1f1b", "micro_batches": 1}, "micro_batches=1 are fewer than the 2 stages"),
        ({"schedule": "interleaved", "stages": 4, "micro_batches": 5}, "cannot be divided into 2 equal rounds over 2"),
    ):
        with pytest.raises(SettingError, match=message):
            lite_of(world, Pipeline(**options)).setup(build())
    for schedule, message in (
        ("2f2b", "schedule='2f2b' of strategy 'pipeline' must be one of gpipe, 1f1b,.* or 'package.module:Class'"),
        ("nowhere:Class", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("pipeline_models:Nothing", "cannot be imported: AttributeError"),
        (":", "cannot be imported: ValueError"),
        ("pipeline_models:Layers", "is no schedule: name a subclass of PipelineScheduleSingle"),
    ):
        with pytest.raises(SettingError, match=message) as raised:
            Pipeline(schedule=schedule)
        assert "\n" not in str(raised.value)
    with lite_of(world, Pipeline()) as lite:
        model = build()
        with pytest.raises(UnsupportedError, match="LBFGS computes with all parameters together"):
            lite.setup(model, torch.optim.LBFGS(model.parameters()))
        with pytest.raises(SettingError, match="finds no nn.Sequential or nn.ModuleList with 2 blocks in this Linear"):
            lite.setup(nn.Linear(2, 2))
        compiled = build()
        compiled.layers[0].compile(backend="eager")
        with pytest.raises(OrderError, match="'layers.0' is compiled"):
            lite.setup(compiled)


def classes_that_do_not_fit_are_named(world: World) -> None:
    """A class of torch or of a stranger that wants other micro-batches or ranks, or computes something else."""
    torchs = "torch.distributed.pipelining"
    for name, options, error, message in (
        (f"{torchs}:Schedule1F1B", {"micro_batches": 1}, SettingError, "cannot run 2 stages on 2 ranks in micro_ba"),
        (f"{torchs}:ScheduleZBVZeroBubble", {"stages": 4}, UnsupportedError, "puts the stages on ranks .0, 1, 1, 0."),
        ("pipeline_models:Halved", {}, UnsupportedError, "computes other values than 'gpipe' for"),
        ("pipeline_models:Needy", {}, SettingError, "TypeError: .*must_have"),
    ):
        with lite_of(world, Pipeline(schedule=name, **options)) as lite:
            model = lite.setup(build())
            with pytest.raises(error, match=message) as raised:
                model(*numbers())
            assert "\n" not in str(raised.value)
    with pytest.raises(SettingError, match="gives each several stages"):
        lite_of(world, Pipeline(schedule="pipeline_models:Halved", stages=4)).setup(build())


ALL = (
    models_that_cannot_be_cut_are_named,
    calls_that_cannot_be_cut_are_named,
    other_stages_are_not_read,
    wrong_settings_are_named,
    classes_that_do_not_fit_are_named,
)


@pytest.fixture(scope="module")
def outcome() -> dict[str, str]:
    return run_checks(2, ranks, ALL, timeout_s=120.0)


@pytest.mark.parametrize("name", [check.__name__ for check in ALL])
def test_pipeline_errors(outcome: dict[str, str], name: str) -> None:
    """Each check, on two ranks; see its own docstring."""
    assert not outcome[name], outcome[name]


def test_weights_shared_by_stages_are_refused() -> None:
    """Both names are in the message; within one stage they may be shared."""
    model = build(GPT)
    model.head.weight = model.tokens.weight
    with pytest.raises(
        UnsupportedError, match="'tokens.weight' and 'head.weight' are one parameter, in stages 0 and 1"
    ):
        make_cut(model, ["blocks.3"], 2, "split=")
    together = [["tokens", "head", "blocks.[0-2]"], ["blocks.[3-5]", "norm"]]
    assert make_cut(model, together, 2, "split=").owners["head.weight"] == 0


def test_a_balanced_cut_counts_what_surrounds_the_blocks() -> None:
    """The parts have about equal numbers of parameters; a model without blocks is named."""
    model = build(lambda: GPT(4))
    assert balanced_split(model, 2) == ["blocks.2"]
    model.head = nn.Linear(8, 400)  # type: ignore[assignment]
    model.tokens = nn.Embedding(2, 8)
    with pytest.raises(SettingError, match="Pipeline\\(split=\\['layers.4', …\\]\\)"):
        balanced_split(model, 2)
    model.head = nn.Linear(8, 100)
    assert balanced_split(model, 2) == ["blocks.3"]
    cut = make_cut(model, None, 2, "the balanced cut")
    assert cut.owners["places"] == 0
    assert cut.owners["mask"] is None
    assert cut.units["head"] == cut.units["blocks.3"] == 1


@pytest.mark.parametrize("split", [[], "layers.4", [1], [["a"], "b"], [[]], {"a": 1}])
def test_wrong_cuts_say_what_to_write(split: Any) -> None:
    """Anything but a list of paths, or lists of patterns."""
    with pytest.raises(SettingError, match=r"must list the modules that start a new stage, such as \['layers.4'\]"):
        check_split(split, "split=")
    with pytest.raises(SettingError, match="must list"):
        Pipeline(split=split)


def test_batches_are_cut_evenly() -> None:
    """As many micro-batches as divide the batch; single rows and numbers go to each."""
    for size, most, count in ((8, 4, 4), (6, 4, 3), (7, 4, 1), (5, 8, 5), (1, 4, 1)):
        x, row = torch.arange(size), torch.ones(1, 3)
        micro = cut_batch((x, 2), {"row": row, "number": torch.tensor(3)}, most)
        assert len(micro.calls) == count
        assert torch.equal(torch.cat([args[0] for args, _ in micro.calls]), x)
        assert all(kwargs["row"] is row and args[1] == 2 for args, kwargs in micro.calls)
    assert len(cut_batch((3,), {}, 4).calls) == 1


def test_a_loss_is_compared_ever_more_rarely() -> None:
    """A mean and a sum are told apart at the first call; a loss that changes its kind is refused later."""
    check = CutCheck("Net")
    due = [check.due(4, is_loss=True) for _ in range(9)]
    assert due == [True, True, False, True, False, False, False, True, False]
    for whole, weight in ((2.5, 0.25), (10.0, 1.0)):
        check = CutCheck("Net")
        check.due(4, is_loss=True)
        check.compare_losses(whole, [1.0, 2.0, 3.0, 4.0], low=False)
        assert check.weight(4) == weight
        check.due(4, is_loss=True)
        with pytest.raises(UnsupportedError, match="no mean or sum"):
            check.compare_losses(12.5 - whole, [1.0, 2.0, 3.0, 4.0], low=False)
        check.compare_losses(float("nan"), [1.0], low=False)
        with pytest.raises(UnsupportedError, match="no mean or sum"):
            check.compare_losses(1.0, [1.0, float("nan")], low=False)
