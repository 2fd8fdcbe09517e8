"""The state of plugins in checkpoints: extensions, callbacks, loggers and strategies."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from plugframe import CheckpointError, CheckpointMismatchError, Lite, PlugframeWarning, PluginContractError, hookimpl
from plugframe.base import Extension
from plugframe.errors import SettingError
from plugframe.hooks.world import World
from plugframe.state.plugins import _NEVER_WRAPPED, HOOKS
from ranks import run_ranks
from stateful_plugins import Average, Beside, Counter, Named, Rounds


def job(*plugins: Any, **settings: Any) -> Lite:
    return Lite(**{"accelerator": "cpu", "devices": 1, "plugins": plugins, **settings})


def model_of(lite: Lite, value: float = 1.0) -> nn.Linear:
    model = nn.Linear(5, 3)
    nn.init.constant_(model.weight, value)
    nn.init.constant_(model.bias, value)
    return lite.setup(model)


def total(model: nn.Linear) -> float:
    return float(model.weight.detach().sum())


@pytest.mark.parametrize("checkpoint", ["safetensors", "dcp"])
def test_every_kind_comes_back(tmp_path: Path, checkpoint: str) -> None:
    """Extensions, callbacks, loggers and the strategy get what they saved, in one load with the model."""
    average, counter, logger, strategy = Average(), Counter(), Named(), Rounds()
    with job(average, callbacks=[counter], loggers=logger, strategy=strategy, checkpoint=checkpoint) as lite:
        model = model_of(lite)
        average.num_updates, counter.num_backwards, logger.run_id, strategy.num_steps = 3, 4, "abc", 5
        lite.save(tmp_path / "x", {"model": model})
    average, counter, logger, strategy = Average(0.0), Counter(), Named(), Rounds()
    with job(average, callbacks=[counter], loggers=logger, strategy=strategy, checkpoint=checkpoint) as lite:
        model = model_of(lite, 0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert lite.load(tmp_path / "x", {"model": model}) == {}
        assert (average.num_updates, counter.num_backwards, logger.run_id, strategy.num_steps) == (3, 4, "abc", 5)
        assert torch.equal(average.values["weight"], torch.full((3, 5), 2.0))
        assert torch.equal(model.weight, torch.ones(3, 5))


def test_what_only_one_side_has_is_one_warning(tmp_path: Path) -> None:
    """It names the plugin by its qualified name, or the path of its class; nothing else fails."""
    with job(Average(), loggers=Named()) as lite:
        model = model_of(lite)
        lite.save(tmp_path / "x", {"model": model})
    counter = Counter()
    with job(counter) as lite:
        model = model_of(lite, 0.0)
        with pytest.warns(PlugframeWarning) as told:
            lite.load(tmp_path / "x", {"model": model})
    assert [str(each.message) for each in told] == [
        "The checkpoint has state of extension stateful_plugins:Average, logger stateful_plugins:Named, not in use "
        "here: it was not restored. The checkpoint has no state of extension stateful_plugins:Counter: it was left as "
        "it is."
    ]
    assert total(model) == 15


def test_a_foreign_file_names_the_plugins_it_has_no_state_of(tmp_path: Path) -> None:
    """The warning about the state of the run names them too."""
    torch.save({"a": 1}, tmp_path / "x")
    with job(Average()) as lite, pytest.warns(PlugframeWarning, match="restored, nor extension stateful_plugins:Aver"):
        lite.load(tmp_path / "x", {"a": 0})


def test_a_state_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    """The error names the plugin; the model is not written, and plugins loaded before are as they were."""
    counter, average = Counter(), Average()
    with job(counter, average) as lite:
        model = model_of(lite)
        lite.save(tmp_path / "x", {"model": model})
        counter.num_backwards, average.refuses = 7, True
        nn.init.zeros_(model.weight)
        text = "nothing was changed. the state of extension stateful_plugins:Average: ValueError: out of paper"
        with pytest.raises(CheckpointMismatchError, match=text):
            lite.load(tmp_path / "x", {"model": model})
        assert (counter.num_backwards, total(model)) == (7, 0)
        average.refuses = False
        average.values["weight"].zero_()
        lite.load(tmp_path / "x", {"model": model})
        assert (counter.num_backwards, average.num_updates, total(model)) == (0, 0, 15)


class Late(Average):
    """Fails after it has written in part."""

    @hookimpl
    def extension_load_state(self, state: dict[str, Any]) -> None:
        super().extension_load_state(state)
        if self.factor == 0:
            self.factor = 1
            raise KeyError("too late")


def test_a_state_loaded_in_part_is_taken_back(tmp_path: Path) -> None:
    """The tensors a plugin has written before it raised hold their old values again."""
    with job(Late()) as lite:
        lite.save(tmp_path / "x", {"model": model_of(lite)})
    late = Late(0.0)
    with job(late) as lite:
        model = model_of(lite)
        with pytest.raises(CheckpointMismatchError, match="too late"):
            lite.load(tmp_path / "x", {"model": model})
        assert not late.values["weight"].any()


def test_a_state_that_cannot_be_saved_is_refused_by_name(tmp_path: Path) -> None:
    """A plugin that raises, or returns what a checkpoint cannot hold, is named; nothing is written."""
    counter = Counter()
    with job(counter) as lite:
        model = model_of(lite)
        counter.fails_on = 0
        text = "nothing was written: the state of extension stateful_plugins:Counter cannot be saved: OSError: no state"
        with pytest.raises(CheckpointError, match=text):
            lite.save(tmp_path / "x", {"model": model})
        counter.fails_on, counter.mine = None, object()  # type: ignore[assignment]
        with pytest.raises(
            CheckpointError, match=r"'extension stateful_plugins:Counter'\]\['ranks'\]\[0\] is an object"
        ):
            lite.save(tmp_path / "x", {"model": model})
    assert not list(tmp_path.iterdir())


def test_objects_of_one_class_need_keys_of_their_own(tmp_path: Path) -> None:
    """Without they are refused at once; with, each gets its own state, whatever their order."""
    with pytest.raises(SettingError, match="extension stateful_plugins:Average is given twice.*state_key of its own"):
        job(Average(), Average())
    averages: Any = {"fast": Average(), "slow": Average()}
    for name, each in averages.items():
        each.state_key = name
    with job(averages["fast"], averages["slow"]) as lite:
        averages["fast"].num_updates, averages["slow"].num_updates = 1, 2
        lite.save(tmp_path / "x", {"model": model_of(lite)})
        averages["fast"].num_updates = averages["slow"].num_updates = 0
    with job(averages["slow"], averages["fast"]) as lite:
        lite.load(tmp_path / "x", {"model": model_of(lite)})
    assert (averages["fast"].num_updates, averages["slow"].num_updates) == (1, 2)
    averages["fast"].state_key = 3
    with pytest.raises(SettingError, match="state_key=3 must be a string"):
        job(averages["fast"])


class Half(Extension):
    @hookimpl
    def extension_state(self) -> dict[str, Any]:
        return {}


class Around(Extension):
    @hookimpl(wrapper=True)
    def strategy_state(self) -> Any:
        return (yield)


class Confused(Extension):
    @hookimpl
    def on_teardown(self) -> None: ...

    @hookimpl
    def logger_state(self) -> dict[str, Any]:
        return {}

    @hookimpl
    def logger_load_state(self, state: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(
    ("plugin", "text"),
    [
        (Half(), "implements extension_state and not extension_load_state: implement both"),
        (Around(), "wraps strategy_state, which nothing wraps"),
    ],
)
def test_hooks_that_would_never_be_called_are_refused(plugin: Any, text: str) -> None:
    """A lone half of a pair, or a wrapper, is an error when the job is made."""
    with pytest.raises(PluginContractError, match=text):
        job(plugin)


def test_no_hook_that_is_called_on_its_plugin_can_be_wrapped() -> None:
    """Those of state, and those that strategies have for steps and gradients."""
    state = {name for pair in HOOKS.values() for name in pair}
    assert set(_NEVER_WRAPPED) == {*state, "strategy_scale_gradients", "strategy_skip_step"}


def test_a_hook_of_another_kind_is_refused() -> None:
    """A callback with the hooks of a logger is told which it has."""
    with pytest.raises(PluginContractError, match="implements logger_state, a hook of the kind logger: implement exte"):
        job(callbacks=[Confused()])


# ---------------------------------------------------------------------- ranks


def lite_on(world: World, strategy: str, checkpoint: str, *plugins: Any) -> Lite:
    # Sharded tensors go through the full road and through the sharded one.
    return Lite(accelerator="cpu", strategy=strategy, checkpoint=checkpoint, plugins=plugins)


def saved_by_ranks(world: World, folder: str) -> None:
    for strategy in ("ddp", "fsdp"):
        for checkpoint in ("safetensors", "dcp"):
            average, counter = Average(), Counter()
            with lite_on(world, strategy, checkpoint, average, counter) as lite:
                model = model_of(lite)
                ramp = torch.arange(15.0).reshape(3, 5)
                weight = average.values["weight"]
                assert isinstance(weight, DTensor) == (strategy == "fsdp")
                full = torch.distributed.tensor.distribute_tensor  # type: ignore[attr-defined]
                weight.copy_(full(ramp, weight.device_mesh, weight.placements) if strategy == "fsdp" else ramp)
                average.num_updates = 5
                handle = lite.save(
                    f"{folder}/{strategy}-{checkpoint}", {"model": model}, wait=checkpoint == "safetensors"
                )
                if handle is not None:
                    weight.zero_()  # the save in the background has its own copy
                    handle.wait()


def loaded_by_ranks(world: World, folder: str) -> None:
    warnings.filterwarnings("ignore", ".*ranks saved, .* load", PlugframeWarning)
    for source in ("ddp", "fsdp"):
        for checkpoint in ("safetensors", "dcp"):
            for strategy in ("ddp", "fsdp"):
                average, counter = Average(), Counter()
                with lite_on(world, strategy, "safetensors", average, counter) as lite:
                    model = model_of(lite)
                    before = average.values["weight"]
                    lite.load(f"{folder}/{source}-{checkpoint}", {"model": model})
                    now = average.values["weight"]
                    assert now is before
                    full = now.full_tensor() if isinstance(now, DTensor) else now
                    assert full.tolist() == torch.arange(15.0).reshape(3, 5).tolist(), (source, checkpoint, strategy)
                    assert (average.num_updates, counter.mine) == (5, 10 * min(world.global_rank, 1))


def refused_by_ranks(world: World, folder: str) -> None:
    average, counter = Average(), Counter()
    with lite_on(world, "fsdp", "safetensors", average, counter) as lite:
        model = model_of(lite)
        lite.save(f"{folder}/y", {"model": model})
        average.num_updates, counter.mine = 9, 8
        if world.global_rank == 1:
            average.refuses = True
        name = "on rank 1; nothing was changed. the state of extension stateful_plugins:Average" * (
            not world.global_rank
        )
        with pytest.raises(CheckpointError, match=name or "out of paper"):
            lite.load(f"{folder}/y", {"model": model})
        average.refuses = False
        assert (average.num_updates, counter.mine) == (9, 8)
        counter.fails_on = 1
        with pytest.raises(
            CheckpointError, match="extension stateful_plugins:Counter cannot be saved on rank 1: OSErr"
        ):
            lite.save(f"{folder}/z", {"model": model})
    odd = Average()
    with lite_on(world, "fsdp", "safetensors", odd) as lite:
        model = model_of(lite)
        if world.global_rank == 1:
            odd.values = {}
        text = "Average cannot be saved on rank 1: its DTensors are not those of rank 0"
        with pytest.raises(CheckpointError, match=text):
            lite.save(f"{folder}/z", {"model": model})
    callbacks = [Counter()] if world.global_rank == 1 else []
    with Lite(accelerator="cpu", strategy="ddp", callbacks=callbacks) as lite:
        model = model_of(lite)
        with pytest.raises(CheckpointError, match="stateful_plugins:Counter is in use on rank 1 and not on rank 0"):
            lite.save(f"{folder}/z", {"model": model})
    assert not Path(folder, "z").exists()


def composed_by_ranks(world: World, folder: str) -> None:
    for num_steps in (5, 0):
        average, beside = Average(), Beside()
        strategies = ["fsdp", beside]
        with Lite(accelerator="cpu", strategy=strategies, mesh={"data": 2, "twin": 1}, plugins=[average]) as lite:
            model = model_of(lite)
            assert beside.num_steps == 1
            beside.num_steps = average.num_updates = num_steps
            if num_steps:
                lite.save(f"{folder}/c", {"model": model})
            lite.load(f"{folder}/c", {"model": model})
            assert (beside.num_steps, average.num_updates) == (5, 5)
    with lite_on(world, "fsdp", "dcp") as lite:
        model = model_of(lite)
        told = "has state of extension stateful_plugins:Average, strategy stateful_plugins:Beside, not in use here"
        if world.global_rank:
            lite.load(f"{folder}/c", {"model": model})
        else:
            with pytest.warns(PlugframeWarning, match=told):
                lite.load(f"{folder}/c", {"model": model})


def test_composed_strategies_have_state(tmp_path: Path) -> None:
    """Each of several strategies of a job gets its own back."""
    run_ranks(2, composed_by_ranks, str(tmp_path))


def test_sharded_states_load_on_any_number_of_ranks(tmp_path: Path) -> None:
    """Saved from 2 ranks under ddp and fsdp, in both formats, and loaded on 2, 1 and 3 under either."""
    run_ranks(2, saved_by_ranks, str(tmp_path))
    for number in (2, 1, 3):
        run_ranks(number, loaded_by_ranks, str(tmp_path))


def test_ranks_refuse_together(tmp_path: Path) -> None:
    """A plugin that raises on one rank, or is in use on one rank, is an error on all, and none has changed."""
    run_ranks(2, refused_by_ranks, str(tmp_path))
