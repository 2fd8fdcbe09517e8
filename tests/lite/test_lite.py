"""`Lite` on one device, and its errors."""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
import os
import pickle
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import plugframe
from plugframe import (
    CheckpointError,
    CheckpointMismatchError,
    Lite,
    OrderError,
    PlugframeWarning,
    SettingError,
    UnsupportedError,
    hookimpl,
    seed_everything,
)
from plugframe.base import Extension
from plugframe.cli.plan_table import plan_rows
from plugframe.hooks.world import World
from plugframe.lite.start_line import start_line


def cpu(**settings: Any) -> Lite:
    return Lite(accelerator="cpu", **{"devices": 1, **settings})


class Doubling(Lite):
    """A subclass in the style of early Lite."""

    def run(self, number: int, *, plus: int = 0) -> int:
        assert self._session.context is not None
        return 2 * number + plus


class Recorder(Extension):
    """Records every notification, and wraps backward."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    @hookimpl
    def on_launch(self) -> None:
        self.heard.append("launch")

    @hookimpl
    def on_setup(self, module: nn.Module) -> None:
        self.heard.append(f"setup {type(module).__name__}")

    @hookimpl
    def on_backward(self, loss: torch.Tensor) -> None:
        self.heard.append(f"backward {loss.ndim}")

    @hookimpl
    def on_optimizer_step(self) -> None:
        self.heard.append("step")

    @hookimpl
    def on_save(self, path: str) -> None:
        self.heard.append("save")

    @hookimpl
    def on_load(self) -> None:
        self.heard.append("load")

    @hookimpl
    def on_teardown(self) -> None:
        self.heard.append("teardown")

    @hookimpl(wrapper=True)
    def strategy_backward(self) -> Generator[None, Any, Any]:
        self.heard.append("before backward")
        return (yield)


def test_launch_with_a_function_on_one_device_calls_it_here() -> None:
    """On one device ``launch(fn)`` calls the function in this process, and returns its result."""
    with cpu() as lite:
        assert lite.launch(lambda inner, a, b: (inner is lite, a + b), 1, b=2) == (True, 3)
        assert lite.launch() is None
        assert lite.launch() is None


def test_run_of_a_subclass_starts_the_job() -> None:
    """An overridden ``run`` is called after launch, with its arguments, and its result is returned."""
    with Doubling(accelerator="cpu", devices=1) as lite:
        assert lite.run(4, plus=1) == 9
        assert lite.run(5) == 10


def test_several_devices_in_plain_python_say_to_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before launch every call that needs ranks is an error that says what to do, and starts nothing."""
    lite = cpu(devices=2)
    calls = {
        "setup": lambda: lite.setup(nn.Linear(1, 1)),
        "save": lambda: lite.save("x", {}),
        "load": lambda: lite.load("x"),
        "barrier": lambda: lite.barrier(),
        "all_reduce": lambda: lite.all_reduce(1.0),
        "setup_dataloaders": lambda: lite.setup_dataloaders(torch.utils.data.DataLoader([1])),
    }
    for name, call in calls.items():
        with pytest.raises(OrderError, match=rf"{name}\(\) needs 2 ranks .*call lite.launch\(\) first.*devices=1"):
            call()
    assert lite.world_size == 2
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("called", [True, False])
def test_a_forgotten_backward_is_told_once(called: bool) -> None:
    """Gradients computed without ``lite.backward`` are a warning at the first step."""
    with Lite(accelerator="cpu", devices=1) as lite:
        model = torch.nn.Linear(2, 1)
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        optimizer.step()  # without gradients there is nothing to say
        model = torch.nn.Linear(2, 1)
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                loss = model(torch.ones(1, 2)).sum()
                lite.backward(loss) if called else loss.backward()
                optimizer.step()
    told = [item.filename for item in caught if "call lite.backward(loss)" in str(item.message)]
    assert told == ([] if called else [__file__])  # at the line of the step


def test_construction_touches_nothing() -> None:
    """Creating a ``Lite`` starts no job and opens no group; two of them share nothing."""
    first, second = cpu(strategy="ddp"), cpu(precision="bf16")
    assert not torch.distributed.is_initialized()
    assert first.strategy is not second.strategy
    with second:
        model = second.setup(nn.Linear(2, 2))
        assert model(torch.ones(1, 2)).dtype is torch.float32
    with first:
        assert first.setup(nn.Linear(2, 2))(torch.ones(1, 2)).dtype is torch.float32
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()


def test_a_forgotten_lite_is_freed() -> None:
    """A ``Lite`` that was never torn down is freed with what it set up."""
    lite = cpu()
    model = lite.setup(nn.Linear(1, 1))
    references = [weakref.ref(lite), weakref.ref(model)]
    lite.teardown()
    del lite, model
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_teardown_twice_and_work_after_it() -> None:
    """``teardown`` may be called twice; afterwards the same ``Lite`` can start again."""
    lite = cpu(strategy="ddp")
    model = lite.setup(nn.Linear(1, 1))
    lite.teardown()
    lite.teardown()
    with pytest.raises(OrderError, match="backward"):
        lite.backward(model(torch.ones(1, 1)).sum())
    lite.setup(model)
    lite.backward(model(torch.ones(1, 1)).sum())
    lite.teardown()


def test_settings_travel_and_the_plan_is_made_anew() -> None:
    """A pickled ``Lite`` carries its settings and the subclass's own attributes."""
    lite = Doubling(accelerator="cpu", devices=1, precision="bf16")
    lite.mark = "mine"  # type: ignore[attr-defined]
    with pickle.loads(pickle.dumps(lite)) as twin:
        assert type(twin) is Doubling
        assert twin.mark == "mine"
        assert twin.plan.choices["precision"].name == "bf16-mixed"
        assert twin.run(1) == 2


def test_one_line_tells_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    """Launch prints one short line, or logs it if logging is configured; verbose, with packages and versions."""
    caplog.set_level("INFO", logger="plugframe")
    with cpu() as lite:
        lite.launch()
        line = lite.plan.line()
        assert f"strategy single (plugframe {plugframe.__version__})" in line
        reasons = {what: why for what, _, why in plan_rows(lite.plan)}
        assert reasons["accelerator"] == "asked for in the code"
        assert reasons["strategy"].startswith("auto")
        assert start_line(lite.plan, {"PLUGFRAME_VERBOSE": "1"}) == line
    assert caplog.messages == ["single on cpu, 32-true"]


def test_notifications_and_wrappers_reach_an_extension(tmp_path: Path) -> None:
    """An extension gets the notifications in order, and wraps the provider."""
    recorder = Recorder()
    with cpu(plugins=[recorder]) as lite:
        model = nn.Linear(1, 1)
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        lite.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
        lite.save(tmp_path / "a", {"model": model})
        lite.load(tmp_path / "a", {"model": model})
    steps = ["launch", "setup Linear", "before backward", "backward 0", "step", "save", "load", "teardown"]
    assert recorder.heard == steps


def test_call_reaches_the_callbacks_that_have_the_method() -> None:
    """``call`` calls a method of every callback that has it, with the arguments."""

    class Callback:
        """A callback with one method."""

        def __init__(self) -> None:
            self.seen: list[Any] = []
            self.number = 3

        def on_epoch(self, epoch: int, *, loss: float) -> None:
            self.seen.append((epoch, loss))

    callback = Callback()
    with cpu(callbacks=[callback, object()]) as lite:
        lite.call("on_epoch", 1, loss=0.5)
        lite.call("on_nothing")
        with pytest.raises(SettingError, match=r"Callback.number is no method"):
            lite.call("number")
    assert callback.seen == [(1, 0.5)]


def test_state_comes_back_nested_and_in_either_order(tmp_path: Path) -> None:
    """``save`` takes (path, state) or (state, path); nested objects are restored in place, plain values in the dict."""
    path = tmp_path / "deep" / "state.safetensors"
    with cpu() as lite:
        model = lite.setup(nn.Linear(2, 2))
        other = nn.Linear(2, 2)
        state: dict[str, Any] = {
            "models": {"a": model, "b": [other]},
            "tensor": torch.ones(2),
            "step": 3,
            "history": [1.5, None, True, (1, 2)],
        }
        lite.save(state, path)
        kept = model.weight.clone(), other.weight.clone()
        tensor = state["tensor"]
        for module in (model, other):
            nn.init.zeros_(module.weight)
        tensor.zero_()
        state["step"], state["history"] = 0, []
        assert lite.load(str(path), state) == {}
        assert torch.equal(model.weight, kept[0])
        assert torch.equal(other.weight, kept[1])
        assert state["tensor"] is tensor
        assert tensor.tolist() == [1, 1]
        assert state["step"] == 3
        assert state["history"] == [1.5, None, True, (1, 2)]
        content = lite.load(path)
        assert sorted(content) == ["history", "models", "step", "tensor"]
        raw = tmp_path / "raw.safetensors"
        lite.save(raw, model.state_dict())
        nn.init.zeros_(model.weight)
        lite.load_raw(raw, model)
        assert torch.equal(model.weight, kept[0])


def test_a_load_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    """One error names every missing and unexpected key and wrong shape, and nothing is loaded."""
    path = tmp_path / "x.safetensors"
    with cpu() as lite:
        first = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
        lite.save(path, {"model": first, "extra": 1})
        second = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 4, bias=False), nn.Linear(4, 4))
        kept = second[0].weight.clone()
        with pytest.raises(CheckpointMismatchError) as caught:
            lite.load(path, {"model": second, "epoch": 0})
        message = str(caught.value)
        for part in (
            "missing: 'epoch' (there is 'extra')",
            "missing in model: 2.weight, 2.bias",
            "unexpected in model: 1.bias",
        ):
            assert part in message
        assert "model.1.weight has shape (4, 2), the checkpoint has (3, 2)" in message
        assert torch.equal(second[0].weight, kept)
        third = nn.Sequential(nn.Linear(2, 2))
        text = r"strict=False allows: unexpected in model: 1\.weight, 1\.bias\.$"
        with pytest.warns(PlugframeWarning, match=text) as told:
            assert lite.load(path, {"model": third}, strict=False) == {"extra": 1}
        assert told[0].filename == __file__
        assert torch.equal(third[0].weight, first[0].weight)


def test_what_a_file_of_another_tool_lacks_is_told(tmp_path: Path) -> None:
    """A file without the state of a run restores the objects, and warns about the rest."""
    model = nn.Linear(2, 2)
    torch.save({"model": model.state_dict()}, tmp_path / "theirs.pt")
    with cpu() as lite:
        other = lite.setup(nn.Linear(2, 2))
        with pytest.warns(
            PlugframeWarning, match=r"theirs\.pt holds no state of a run: random generators, .* not"
        ) as told:
            lite.load(tmp_path / "theirs.pt", {"model": other})
        assert told[0].filename == __file__
        assert torch.equal(other.weight, model.weight)


def test_a_filter_saves_part_of_an_object(tmp_path: Path) -> None:
    """``filter`` keeps the entries of an object for which it returns True."""
    with cpu() as lite:
        keep = {"model": lambda name, value: name.endswith("bias")}
        lite.save(tmp_path / "x", {"model": nn.Linear(1, 1)}, filter=keep)
        assert list(lite.load(tmp_path / "x")["model"]) == ["bias"]
        with pytest.raises(CheckpointError, match="filter names 'other'"):
            lite.save(tmp_path / "x", {"model": nn.Linear(1, 1)}, filter={"other": keep["model"]})


def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    """``save`` refuses, by key, values that cannot be loaded, and writes nothing."""
    with cpu() as lite:
        with pytest.raises(CheckpointError, match="args"):
            lite.save(tmp_path / "x", {"args": object()})
        with pytest.raises(SettingError, match="takes the state as a dict"):
            lite.save(tmp_path / "x", [1])
        with pytest.raises(SettingError, match="path is a str or a Path"):
            lite.save(3, {"a": 1})
        with pytest.raises(CheckpointError):
            lite.save(tmp_path, {"a": 1})
        with pytest.warns(PlugframeWarning, match="wait=False has no effect"):
            lite.save(tmp_path / "y", {"a": 1}, wait=False)
    assert sorted(os.listdir(tmp_path)) == ["y"]


def test_metrics_reach_the_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``log`` and ``log_dict`` reach every logger; without one they warn."""
    monkeypatch.chdir(tmp_path)
    with cpu(loggers="csv") as lite:
        lite.log("loss", torch.tensor(0.5), step=1)
        lite.log_dict({"loss": 0.25, "accuracy": 1}, step=2)
        with pytest.raises(SettingError, match="a metric is one number, got a tensor of shape"):
            lite.log("loss", torch.ones(2))
    files = list(tmp_path.rglob("*.csv"))
    assert len(files) == 1
    rows = list(csv.DictReader(files[0].read_text().splitlines()))
    assert [row["loss"] for row in rows] == ["0.5", "0.25"]
    with (
        cpu() as lite,
        pytest.warns(
            PlugframeWarning, match=r"no logger: pass one, as in Lite\(loggers='csv'\), or [\w, ]*tensorboard"
        ),
    ):
        lite.log("loss", 1.0)


def test_the_profiler_writes_a_trace_of_any_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension ``profiler``, by name, writes what each step did as a Chrome trace."""
    monkeypatch.chdir(tmp_path)
    for strategy in ("single", "ddp"):
        with cpu(plugins="profiler", strategy=strategy) as lite:
            model = nn.Linear(1, 1)
            model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
            for batch in lite.setup_dataloaders(torch.utils.data.DataLoader(torch.ones(4, 1))):
                lite.backward(model(batch).sum())
                optimizer.step()
            lite.save(tmp_path / "x", {"model": model})
        traces = list(tmp_path.rglob("*.json"))
        assert len(traces) == 1
        events = json.loads(traces[0].read_text())["traceEvents"]
        names = [event["name"] for event in events if event.get("ph") == "X"]
        for part in ("setup", "backward", "step", "next_batch", "save"):
            assert any(part in name for name in names), (part, names)
        assert sum("backward" in name for name in names if "strategy" in name) in (0, 4)
        traces[0].unlink()


def test_modules_are_built_in_place_and_dtype() -> None:
    """``init_module`` and ``init_tensor`` use the precision's dtype; ``empty_init`` defers initialisation."""
    with cpu(precision="bf16-true") as lite:
        with lite.init_module():
            assert nn.Linear(2, 2).weight.dtype is torch.bfloat16
        with lite.init_tensor():
            assert torch.zeros(1).dtype is torch.bfloat16
        assert torch.get_default_dtype() is torch.float32
    with cpu() as lite:
        weights = []
        for empty_init in (True, False):
            torch.manual_seed(0)
            with lite.init_module(empty_init=empty_init):
                module = nn.Linear(100, 100)
            assert module.weight.is_meta is empty_init
            weights.append(lite.setup(module).weight)
        assert torch.equal(*weights)
    with cpu(precision="bf16") as lite, lite.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16


def test_seeds_repeat_and_are_checked() -> None:
    """The same seed gives the same numbers; an invalid seed is refused."""
    import random

    import numpy

    drawn = []
    for _ in range(2):
        assert seed_everything(7) == 7
        drawn.append((random.random(), numpy.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
    for wrong in (-1, 2**32, True, "one", 1.5):
        with pytest.raises(SettingError, match="is not a seed: pass an integer from 0"):
            Lite.seed_everything(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": True}, "devices=True in the code is not a value of devices"),
        ({"devices": 0}, "devices=0 does not fit accelerator 'cpu'.*a number of processes from 1"),
        ({"devices": "two"}, "devices='two' does not fit"),
        ({"devices": [0, 1]}, "does not fit accelerator 'cpu'"),
        ({"num_nodes": 0}, "num_nodes=0 in the code: it is an integer from 1"),
        ({"num_nodes": "2"}, "num_nodes='2'"),
        ({"strategy": "dpp"}, r"strategy='dpp' is not installed. Did you mean 'ddp'\? Installed: .*ddp_spawn"),
        ({"strategy": "dp"}, "strategy='dp' is not installed: .*'ddp'"),
        ({"strategy": 1.5}, "strategy=1.5"),
        ({"precision": 15}, "precision='15' is not installed. Did you mean '16'"),
        ({"precision": "16-mxed"}, "Did you mean '16-mixed'"),
        ({"accelerator": "cud"}, "Did you mean 'cuda'"),
        ({"accelerator": "mps"}, "accelerator='mps' is not available on this machine.*Available here: .*cpu"),
        ({"collective": "single", "strategy": "ddp"}, "collective='single' does not provide 'process-group'.*'torch'"),
        ({"loggers": "cvs"}, "Did you mean 'csv'"),
        ({"plugins": ["profile"]}, "Did you mean 'profiler'"),
        ({"plugins": ["profiler", "profiler"]}, "given twice"),
        ({"launcher": "elastik"}, "Did you mean 'elastic'"),
        ({"strategy": "ddp_spawn", "launcher": "fork"}, "launcher='fork' in the code, but 'spawn' in strategy"),
        ({"environment": "slrm"}, "Did you mean 'slurm'"),
        ({"checkpoint": "safetensor"}, "Did you mean 'safetensors'"),
        ({"callbacks": ["nowhere"]}, "write 'package.module:Class'"),
        ({"strategy": Lite}, r"neither the name of a plugin nor a strategy object. Pass an instance: Lite\(\)"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    """Every wrong setting is an error in one line: the value given, what is allowed, the closest match."""
    with pytest.raises((SettingError, UnsupportedError, ValueError), match=message) as caught:
        Lite(**{"accelerator": "cpu", **settings})
    assert "\n" not in str(caught.value)


def test_worlds_of_one_are_the_default() -> None:
    """Outside of a job this is rank 0 of 1."""
    with cpu() as lite:
        assert (lite.global_rank, lite.local_rank, lite.node_rank, lite.world_size) == (0, 0, 0, 1)
        assert lite.is_global_zero
        assert World() == World(global_rank=0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_goes_on_inside_an_epoch(tmp_path: Path, num_workers: int) -> None:
    """A checkpoint between two batches resumes with the next one, shuffled, with and without workers."""

    def loader(lite: Lite) -> Any:
        data = torch.arange(10.0)
        return lite.setup_dataloaders(
            torch.utils.data.DataLoader(data, batch_size=2, shuffle=True, num_workers=num_workers)
        )

    seed_everything(3)
    with cpu() as lite:
        batches = loader(lite)
        first = [batch.tolist() for batch in batches]
        second = []
        for position, batch in enumerate(batches):
            second.append(batch.tolist())
            if position == 1:
                lite.save(tmp_path / "x", {"step": 7})
        third = [batch.tolist() for batch in batches]
    assert first != second != third
    seed_everything(4)
    with cpu() as lite:
        batches = loader(lite)
        state = {"step": 0}
        lite.load(tmp_path / "x", state)
        assert [batch.tolist() for batch in batches] == second[2:]
        assert [batch.tolist() for batch in batches] == third
        assert state["step"] == 7


class Beside:
    """A class with a ``run`` that does not depend on plugframe."""

    def run(self) -> int:
        return self._session.context is not None and 7  # type: ignore[attr-defined,no-any-return]


class Mixed(Beside, Doubling):
    """A subclass that inherits ``run`` from another class."""


class Deeper(Doubling):
    """A subclass whose ``run`` calls that of its base."""

    def run(self, number: int, *, plus: int = 0) -> int:
        return super().run(number, plus=plus) + 100


def test_run_starts_the_job_wherever_it_comes_from() -> None:
    """A ``run`` of a mix-in, and one that calls that of its base, launch the job too."""
    with Mixed(accelerator="cpu", devices=1) as lite:
        assert lite.run() == 7
    with Deeper(accelerator="cpu", devices=1) as deeper:
        assert deeper.run(4, plus=1) == 109


def test_gathered_collections_keep_their_types() -> None:
    """Collectives keep the classes of mappings and dataclasses."""

    @dataclasses.dataclass
    class Metrics:
        """Some numbers."""

        loss: Any
        count: int

    class Output(OrderedDict[str, Any]):
        """A mapping with an attribute."""

        name = "output"

    with cpu() as lite:
        metrics = lite.all_gather(Metrics(torch.ones(2), 3))
        assert type(metrics) is Metrics
        assert metrics.loss.shape == (1, 2)
        assert metrics.count.tolist() == [3]
        output = lite.all_gather(Output(logits=torch.ones(2)))
        assert type(output) is Output
        assert output["logits"].shape == (1, 2)


def test_loaders_are_freed_with_their_last_reference() -> None:
    """``Lite`` holds no reference that keeps loaders or data alive."""
    with cpu() as lite:
        data = torch.utils.data.TensorDataset(torch.zeros(4))
        loader = lite.setup_dataloaders(torch.utils.data.DataLoader(data))
        list(loader)
        reference = weakref.ref(data)
        del loader, data
        assert reference() is None
