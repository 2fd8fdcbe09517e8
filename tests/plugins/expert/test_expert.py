"""Expert parallelism on gloo ranks: numbers of one process, and what cannot be divided is refused by name."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from expert_checks import build, lite_of, ranks, shard_of, trains_alike
from expert_models import Attending, Capacity, Dense, Expert, Layer, Loop, Model, Skipping, Sorted, data, loss_of
from expert_wrong_models import WRONG
from plugframe import SettingError, UnsupportedError, UsageError
from plugframe.hooks.world import World
from plugframe_builtins.context.strategy import ContextParallel
from plugframe_builtins.expert.plan import find_experts
from plugframe_builtins.expert.strategy import ExpertParallel
from plugframe_builtins.fsdp.strategy import FSDP
from ranks import run_checks

TWO = {"data": 2, "expert": 2}
MAKERS: dict[str, Callable[[], Model]] = {
    "loop": Model,
    "skipping": lambda: Model(Skipping),
    "dense": lambda: Model(Dense),
    "sorted": lambda: Model(Sorted, "grouped"),
    "capacity": lambda: Model(Capacity, "batched"),
}


#: What trains as one process does: strategy, mesh, model, precision.
MIXES: tuple[tuple[Any, Any, str, str], ...] = (
    ("fsdp+expert", TWO, "loop", "32-true"),
    ("ddp+expert", TWO, "skipping", "32-true"),
    ("ddp+expert", {"data": 1, "expert": 4}, "loop", "32-true"),
    ("expert", None, "sorted", "32-true"),
    ("expert", TWO, "dense", "32-true"),
    ("fsdp+expert", TWO, "capacity", "32-true"),
    ("fsdp+expert", {"data": 4, "expert": 1}, "loop", "32-true"),
    ("fsdp+expert", TWO, "loop", "bf16-mixed"),
    ("ddp+expert", TWO, "capacity", "bf16-true"),
)


def mixes_train_like_one_process(world: World) -> None:
    """Loops over a list, with and without skipped experts, and stacked weights: fp32 within 1e-5, bf16 within its."""
    for strategy, mesh, name, precision in MIXES:
        with lite_of(strategy, mesh, precision=precision) as lite:
            if precision == "bf16-true":
                model = build(MAKERS[name])
                lite.setup(model)
                lite.backward(loss_of(model, data().bfloat16()))
                assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.bfloat16}
                continue
            model, plain = trains_alike(lite, MAKERS[name], 1e-5 if precision == "32-true" else 3e-2)
            if name == "loop" and precision == "32-true":
                # What a forward counts is counted once.
                mixtures = [m for m in model.modules() if isinstance(m, Loop)]
                theirs = [m for m in plain.modules() if isinstance(m, Loop)]
                assert [len(m.runs) for m in mixtures] == [len(m.runs) for m in theirs]


#: Saved under one, loaded under the next: list or stacked.
WAYS: tuple[tuple[Any, Any], ...] = (
    ("fsdp+expert", TWO),
    ("fsdp", None),
    ("ddp+expert", {"data": 1, "expert": 4}),
    ("expert", None),
)


def checkpoints_go_from_mesh_to_mesh(world: World) -> None:
    """What was saved on a mesh is loaded on the next one, in both formats."""
    for name, checkpoint in (("loop", "safetensors"), ("loop", "dcp"), ("sorted", "dcp")):
        expected: list[Tensor] = []
        path = os.path.join(os.environ["EXPERT_FOLDER"], f"{name}-{checkpoint}")
        for number, (strategy, mesh) in enumerate(WAYS):
            with lite_of(strategy, mesh, checkpoint=checkpoint) as lite:
                model = build(MAKERS[name], seed=7 if number else 1)
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
                    expected.append(loss_of(model, data()))
        torch.testing.assert_close(torch.stack(expected), expected[0].expand(len(expected)), rtol=1e-5, atol=1e-5)


def evaluation_may_be_uneven(world: World) -> None:
    """Ranks without a batch left run their experts for the others; every sample is evaluated once."""
    for name in ("loop", "sorted"):
        with lite_of("fsdp+expert", TWO) as lite:
            model, plain = build(MAKERS[name]), build(MAKERS[name])
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            lite.setup(model, optimizer)
            index, count = shard_of(lite)
            lite.backward(loss_of(model, data()[index::count]))
            loss_of(plain, data()).backward()
            optimizer.step()
            torch.optim.SGD(plain.parameters(), lr=0.1).step()
            model.eval()
            loader = lite.setup_dataloaders(DataLoader(data(5), batch_size=1))  # type: ignore[arg-type]
            total = torch.zeros(())
            with torch.no_grad():
                for batch in loader:
                    total += model(batch).square().sum()
                expected = plain(data(5)).square().sum()
            torch.testing.assert_close(lite.all_reduce(total, reduce_op="sum"), expected, rtol=1e-5, atol=1e-5)


def further_uses(world: World) -> None:
    """Activation checkpointing, deferred initialization, copies, parts of the model, and beside context."""
    with lite_of([FSDP(activation_checkpointing=True), "expert"], TWO) as lite:
        trains_alike(lite, Model)
    with_context = ["fsdp", ContextParallel(attention="gather"), "expert"]
    with lite_of(with_context, {"data": 1, "context": 2, "expert": 2}) as lite:
        trains_alike(lite, lambda: Model(Dense, layer=Attending))
    with lite_of("fsdp+expert", TWO) as lite:
        torch.manual_seed(1)
        with lite.init_module(empty_init=True):
            deferred = Model()
        lite.setup(deferred)
        model, plain = build(), build()
        lite.setup(model)
        assert isinstance(model.layers[0].mixture.experts[0], Expert)
        torch.testing.assert_close(deferred(data()), plain(data()))
        copied = copy.deepcopy(model)
        torch.testing.assert_close(copied(data()), plain(data()))
        torch.testing.assert_close(model(data()[:0]), plain(data()[:0]))
        with pytest.raises(UsageError, match="was called outside of the forward of 'layers.0.mixture'"):
            model.layers[0].mixture.experts[0](torch.zeros(2, 6))
        state = lite.state_dict(model, all_ranks=True)
        plain.load_state_dict(state)
        rest, its = build(lambda: Layer(Loop()), 3), build(lambda: Layer(Loop()), 3)
        lite.setup(rest)
        x = torch.randn(8, 3, 6)
        torch.testing.assert_close(rest(x), its(x))
        root, plain_root = build(Loop), build(Loop)
        lite.setup(root)
        torch.testing.assert_close(root(x), plain_root(x))
    assert type(root) is Loop
    assert [type(expert) for expert in root.experts] == [Expert] * 5


def wrong_models_are_refused(world: World) -> None:
    """What a second run of a forward would show, what experts may not do, and what cannot be sent, by name."""
    for make, message in WRONG:
        refused = pytest.raises((UnsupportedError, UsageError), match=message)
        with lite_of("ddp+expert", {"data": 1, "expert": 2}, 2) as lite, refused:
            model = build(make)
            lite.setup(model)
            lite.backward(loss_of(model, data()))
    six = ExpertParallel(plan={"layers.*.mixture.experts": "modules"})
    with lite_of(["ddp", six], {"data": 1, "expert": 2}, 2) as lite:
        lite.setup(build())


ON_FOUR = (
    mixes_train_like_one_process,
    checkpoints_go_from_mesh_to_mesh,
    evaluation_may_be_uneven,
    further_uses,
)
ON_TWO = (wrong_models_are_refused,)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = str(tmp_path_factory.mktemp("expert"))
    found = run_checks(4, ranks, ON_FOUR, timeout_s=240.0, env={"EXPERT_FOLDER": folder})
    return {**found, **run_checks(2, ranks, ON_TWO, timeout_s=120.0)}


@pytest.mark.parametrize("name", [check.__name__ for check in (*ON_FOUR, *ON_TWO)])
def test_expert_parallelism(outcome: dict[str, str], name: str) -> None:
    """Every check passes on two or four ranks."""
    assert outcome[name] == "", outcome[name]


def test_lists_called_experts_are_recognized() -> None:
    """Without a plan these are the experts; a plan names a list, or the module that has it."""
    assert [each.path for each in find_experts(Model(), None)] == [f"layers.{i}.mixture.experts" for i in range(2)]
    assert [each.path for each in find_experts(Model(), {"layers.1.mixture": "modules"})] == [
        "layers.1.mixture.experts"
    ]
    assert find_experts(Model(), {}) == []
    assert find_experts(Model(Sorted, "grouped"), None)[0].dispatch is not None


class Unlike(nn.Module):
    """A list of modules that are not alike."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Expert(), Expert(5)])
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("model", "plan", "message"),
    [
        (Model(Sorted), None, r"'layers.0.mixture.experts' is a Stacked, .* use ExpertParallel\(plan="),
        (Unlike().blocks, None, "no list is called 'experts', and its lists of alike modules are none"),
        (Unlike(), None, "'experts' is a ModuleList, not a list of alike modules"),
        (Model(), {"layer.*": "modules"}, "names 'layer.*', which matches no submodule of this Model"),
        (Model(), {"enter": "modules"}, "'enter', a Linear with 0 lists of alike modules: name the list"),
        (Model(), {"layers.*.mixture.experts": "grouped"}, "has 'grouped' for the list .*: write \"modules\""),
        (Unlike(), {"experts": "modules"}, "whose modules are not alike"),
        (Model(), {"layers.*.mixture.experts": "modules", "layers.0.mixture.experts.0": len}, "are within"),
    ],
)
def test_wrong_plans(model: nn.Module, plan: Any, message: str) -> None:
    """Each is refused by name, with what to write."""
    with pytest.raises(SettingError, match=message):
        find_experts(model, plan)


@pytest.mark.parametrize("plan", ["experts", {"a": "rowwise"}, {3: "modules"}])
def test_what_is_no_plan(plan: Any) -> None:
    """A plan maps paths to styles or functions."""
    with pytest.raises(SettingError, match="plan"):
        ExpertParallel(plan=plan)
