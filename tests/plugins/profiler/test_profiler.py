"""The profiler: which events a run leaves in the trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from plugframe import Lite, PlugframeWarning, SettingError
from plugframe.base import Checkpoint, Collective, Precision, Strategy
from plugframe.core.planning.plan import Choice
from plugframe.core.runtime.binding import Binding
from plugframe.hooks import KINDS, Plugin, hookimpl
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins.cpu.accelerator import CPU
from plugframe_builtins.profiler.profiler import Profiler


class Nested(Strategy):
    """A strategy whose step runs the backward hook, and whose batches fail."""

    hooks: Any

    @hookimpl
    def strategy_optimizer_step(self, optimizer: Any, step: Callable[..., Any], closure: Any) -> Any:
        self.hooks.strategy_backward(loss=None, module=None, args=(), kwargs={})
        return step()

    @hookimpl
    def strategy_backward(self, loss: Any, module: Any, args: Any, kwargs: Any) -> None:
        pass

    @hookimpl
    def strategy_next_batch(self, iterator: Any, exhausted: Any) -> Any:
        raise RuntimeError("no data")


class Forward(Precision):
    """A precision whose forward context gives something and sees exceptions."""

    left: list[Any]

    @hookimpl
    def precision_forward_context(self) -> AbstractContextManager[Any]:
        @contextmanager
        def context() -> Iterator[str]:
            try:
                yield "entered"
            except ValueError:
                self.left.append("error")
                raise

        return context()


class Nowhere(Checkpoint):
    """A checkpoint that keeps nothing."""

    @hookimpl
    def checkpoint_save(self, path: str, state: Any, info: Any, wait: bool) -> None:
        pass

    @hookimpl
    def checkpoint_load(self, path: str, trusted: bool, lazy: bool) -> dict[str, Any]:
        return {}


def hooks_with(profiler: Profiler) -> Any:
    """Return the hooks of the plugins above, wrapped by the profiler."""
    strategy, precision, binding = Nested(), Forward(), Binding()
    precision.left = []
    plugins = {
        "accelerator": CPU(),
        "strategy": strategy,
        "precision": precision,
        "collective": Collective(),
        "checkpoint": Nowhere(),
        "extension": profiler,
    }
    for kind, plugin in plugins.items():
        name = type(plugin).__name__
        choice = Choice(kind=kind, name=name, reason="", descriptor=Plugin(factory=f"x:{name}"), instance=plugin)
        binding.add(choice, plugin)
    strategy.hooks = binding.bind()
    return SimpleNamespace(all=strategy.hooks, strategy=strategy, precision=precision)


def context_of(rank: int = 0, world_size: int = 1, **hooks: Any) -> Context:
    world = World(global_rank=rank, local_rank=rank, world_size=world_size, local_world_size=world_size)
    return Context(world=world, device=torch.device("cpu"), hooks=SimpleNamespace(**hooks), names={})


def events_in(path: Path) -> list[dict[str, Any]]:
    trace = json.loads(path.read_text())
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def run_step(hooks: Any) -> Any:
    return hooks.strategy_optimizer_step(optimizer=None, step=lambda: "result", closure=None)


def test_wrapped_hooks_exist() -> None:
    """Every hook the profiler wraps is a hook of some kind, and a plain name of what it times."""
    known = {name for kind in KINDS.values() for name in vars(kind.spec)}
    wrapped = {n for n, m in vars(Profiler).items() if getattr(m, "plugframe_impl", {}).get("wrapper")}
    assert wrapped <= known
    assert {"strategy_backward", "collective_all_reduce", "checkpoint_save", "checkpoint_load"} <= wrapped


def test_nested_calls_are_nested_events(tmp_path: Path) -> None:
    """A hook called inside another one is an event inside that one's event; results pass through."""
    profiler = Profiler(tmp_path / "deep" / "trace.json")
    hooks = hooks_with(profiler).all
    hooks.on_launch(context=context_of())
    assert run_step(hooks) == "result"
    hooks.on_teardown()
    inner, outer = events_in(tmp_path / "deep" / "trace.json")
    assert (inner["name"], outer["name"]) == ("strategy_backward", "strategy_optimizer_step")
    assert (inner["cat"], inner["pid"]) == ("strategy", 0)
    assert inner["tid"] == outer["tid"]
    assert outer["ts"] <= inner["ts"]
    # Microseconds since 1970 have a quarter of one as their last digit.
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1.0


def test_a_failing_hook_is_recorded_and_fails_on(tmp_path: Path) -> None:
    """An exception goes through unchanged, and what raised it is in the trace."""
    profiler = Profiler(tmp_path / "trace.json")
    hooks = hooks_with(profiler).all
    hooks.on_launch(context=context_of())
    with pytest.raises(RuntimeError, match="no data"):
        hooks.strategy_next_batch(iterator=iter(()), exhausted=None)
    hooks.on_teardown()
    assert [event["name"] for event in events_in(tmp_path / "trace.json")] == ["strategy_next_batch"]


def test_the_forward_is_what_runs_in_its_context(tmp_path: Path) -> None:
    """The event of a forward lasts as long as the context, which works as it does without a profiler."""
    profiler = Profiler(tmp_path / "trace.json")
    made = hooks_with(profiler)
    made.all.on_launch(context=context_of())
    with made.all.precision_forward_context() as entered:
        assert entered == "entered"
        run_step(made.all)
    with pytest.raises(ValueError, match="bad"), made.all.precision_forward_context():
        raise ValueError("bad")
    assert made.precision.left == ["error"]
    made.all.on_teardown()
    names = [event["name"] for event in events_in(tmp_path / "trace.json")]
    assert names == ["strategy_backward", "strategy_optimizer_step", "forward", "forward"]


def test_every_rank_writes_its_own_file(tmp_path: Path) -> None:
    """With several ranks each file and its events carry the rank."""
    for rank in range(2):
        hooks = hooks_with(Profiler(tmp_path / "run.trace.json")).all
        hooks.on_launch(context=context_of(rank, 2))
        run_step(hooks)
        hooks.on_teardown()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "run.trace.rank0.json",
        "run.trace.rank1.json",
    ]
    assert {event["pid"] for event in events_in(tmp_path / "run.trace.rank1.json")} == {1}


def test_memory_is_bounded(tmp_path: Path) -> None:
    """The first events are kept; the dropped ones are counted in the trace and told once, on rank 0."""
    for rank in range(2):
        hooks = hooks_with(Profiler(tmp_path / "trace.json", max_events=3)).all
        hooks.on_launch(context=context_of(rank, 2))
        for _ in range(4):
            run_step(hooks)
        if rank == 0:
            with pytest.warns(PlugframeWarning, match=r"holds the first 3 events; 5 later ones were dropped"):
                hooks.on_teardown()
        else:
            hooks.on_teardown()
        trace = json.loads((tmp_path / f"trace.rank{rank}.json").read_text())
        assert trace["metadata"]["dropped_events"] == 5
        assert len(events_in(tmp_path / f"trace.rank{rank}.json")) == 3


def test_a_profiler_can_be_used_again(tmp_path: Path) -> None:
    """A second run replaces the trace of the first; a tear-down without a run writes nothing."""
    profiler = Profiler(tmp_path / "trace.json")
    hooks = hooks_with(profiler).all
    hooks.on_teardown()
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        hooks.on_launch(context=context_of())
        run_step(hooks)
        hooks.on_teardown()
    assert len(events_in(tmp_path / "trace.json")) == 2


def test_synchronizing_waits_for_the_device(tmp_path: Path) -> None:
    """With ``synchronize=True`` the device is waited for before each look at the clock, and not without."""
    for synchronize, expected in ((False, 0), (True, 4)):
        waits: list[torch.device] = []

        def wait(device: torch.device, waits: list[torch.device] = waits) -> None:
            waits.append(device)

        hooks = hooks_with(Profiler(tmp_path / "trace.json", synchronize=synchronize)).all
        hooks.on_launch(context=context_of(accelerator_synchronize=wait))
        run_step(hooks)
        hooks.on_teardown()
        assert len(waits) == expected


def test_the_number_of_events_must_be_positive() -> None:
    """A wrong option is refused when the profiler is made."""
    with pytest.raises(SettingError, match=r"max_events=0\): it is an integer from 1"):
        Profiler(max_events=0)


def test_a_run_is_profiled_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``plugins="profiler"`` traces a plain loop: its forwards, backwards, steps and saves."""
    monkeypatch.chdir(tmp_path)
    with Lite(accelerator="cpu", devices=1, plugins="profiler") as lite:
        module = nn.Linear(2, 1)
        module, optimizer = lite.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        for _ in range(2):
            lite.backward(module(torch.ones(1, 2)).sum())
            optimizer.step()
        lite.save("checkpoint", {"model": module})
    names = [event["name"] for event in events_in(tmp_path / "plugframe-trace.json")]
    for name in ("forward", "strategy_backward", "strategy_optimizer_step"):
        assert names.count(name) == 2
    assert names.count("checkpoint_save") == 1
