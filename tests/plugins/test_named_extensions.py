"""Extensions that watch what a script logs, or add to it; averages of weights, and steps that are not made."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from plugframe import CheckpointMismatchError, Lite, OrderError, PlugframeWarning, SettingError, hookimpl
from plugframe.base import Logger
from plugframe.hooks.world import World
from plugframe.testing import run_ranks
from plugframe_builtins.best_model.extension import BestModel
from plugframe_builtins.early_stopping.extension import EarlyStopping
from plugframe_builtins.grad_norm.extension import GradNorm
from plugframe_builtins.lr_monitor.extension import LRMonitor
from plugframe_builtins.nan_guard.extension import NaNGuard
from plugframe_builtins.swa.extension import SWA
from plugframe_builtins.throughput import extension as throughput
from plugframe_builtins.throughput.extension import Throughput


class Memory(Logger):
    """Keeps what is recorded."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    @hookimpl
    def logger_log(self, metrics: dict[str, float], step: int | None) -> None:
        self.rows.append(dict(metrics))


def job(*plugins: Any, logger: Any = None, **settings: Any) -> Lite:
    return Lite(
        **{"accelerator": "cpu", "devices": 1, "plugins": list(plugins), "loggers": logger or Memory(), **settings}
    )


def stops(lite: Lite, values: list[float], name: str = "val_loss") -> list[bool]:
    found = []
    for value in values:
        lite.log(name, value)
        found.append(lite.should_stop)
    return found


# ---------------------------------------------------------------- early-stopping


@pytest.mark.parametrize(
    ("options", "values", "stopped"),
    [
        ({"patience": 2}, [3.0, 2.0, 2.5, 1.0, 1.0, 1.0], 5),
        ({"patience": 2, "mode": "max"}, [1.0, 2.0, 2.0, 1.5], 3),
        ({"patience": 1, "min_delta": 0.5}, [3.0, 2.6], 1),
        ({"patience": 2}, [3.0, math.nan, math.nan], 2),
        ({"patience": 2}, [math.nan, 5.0, 4.0, 3.0], None),
    ],
)
def test_early_stopping_follows_its_options(options: dict[str, Any], values: list[float], stopped: int | None) -> None:
    """Patience, mode and least change; NaN is no improvement. The stop is read where the script reads should_stop."""
    with job(EarlyStopping(**options)) as lite:
        found = stops(lite, values)
    assert found == [stopped is not None and number >= stopped for number in range(len(values))]


def test_early_stopping_works_without_a_logger_and_counts_on_after_a_resume(tmp_path: Path) -> None:
    """The count is in the checkpoint; a checkpoint of another metric is refused by name."""
    with job(EarlyStopping(patience=3), loggers=()) as lite:
        assert stops(lite, [1.0, 2.0, 2.0]) == [False] * 3
        lite.save(tmp_path / "x", {})
    with job(EarlyStopping(patience=3), loggers=()) as lite:
        lite.load(tmp_path / "x", {})
        assert stops(lite, [2.0]) == [True]
    with (
        job(EarlyStopping(monitor="accuracy")) as lite,
        pytest.raises(CheckpointMismatchError, match="'val_loss' \\(min\\)"),
    ):
        lite.load(tmp_path / "x", {})


@pytest.mark.parametrize("num_calls", [1, 100])
def test_a_metric_that_never_comes_is_told(num_calls: int) -> None:
    """At the end, or after a hundred calls, with the names that were logged."""
    with (
        pytest.warns(
            PlugframeWarning, match="watches 'val_loss', which was never .*Did you mean 'val/loss'?"
        ) as warned,
        job(EarlyStopping()) as lite,
    ):
        stops(lite, [1.0] * num_calls, "val/loss")
    assert len(warned) == 1


# ---------------------------------------------------------------- best


def test_best_tells_of_improvements_and_keeps_its_value(tmp_path: Path) -> None:
    """Each improvement once; a resumed run compares with the best value of the run before."""
    best = BestModel(monitor="accuracy", mode="max")
    found = []
    with job(best) as lite:
        lite.launch()
        assert (best.improved(), best.metrics) == (False, {})
        for value in (0.5, 0.75, 0.25):
            lite.log("accuracy", value)
            found.append((best.improved(), best.improved(), best.metrics["accuracy"]))
        lite.save(tmp_path / "x", {})
    assert found == [(True, False, 0.5), (True, False, 0.75), (False, False, 0.25)]
    again = BestModel(monitor="accuracy", mode="max")
    with job(again) as lite:
        lite.load(tmp_path / "x", {})
        lite.log("accuracy", 0.6)
        assert (again.improved(), again.value) == (False, 0.75)
    with pytest.raises(OrderError, match="while the job runs"):
        again.improved()


# ---------------------------------------------------------------- what is added to the log


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def steps(lite: Lite, count: int, **clip: Any) -> Iterator[tuple[Any, Any, float]]:
    """Train; yield model, optimizer and the norm of the gradients of plain torch after each step."""
    net = network()
    groups = [{"params": net[0].parameters(), "lr": 0.5}, {"params": net[2].parameters(), "lr": 0.25}]
    net, optimizer = lite.setup(net, torch.optim.SGD(groups))
    for step in range(count):
        optimizer.zero_grad()
        lite.backward(net(torch.full((3, 4), 1.0 + step)).square().mean())
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]))
        if clip:
            lite.clip_gradients(net, optimizer, **clip)
        optimizer.step()
        yield net, optimizer, norm


def test_rates_and_norms_are_recorded_with_what_the_script_logs() -> None:
    """They are added to its calls, at its steps; a metric of that name that it logs itself stays."""
    for clip in ({}, {"max_norm": 0.01}, {"clip_val": 10.0}):
        memory, norms = Memory(), []
        with job(LRMonitor(), GradNorm(), logger=memory) as lite:
            lite.log("loss", 0.0)
            for _, _, norm in steps(lite, 2, **clip):
                lite.log("loss", 1.0)
                norms.append(norm)
            lite.log("lr/0", 7.0)
        assert memory.rows[0] == {"loss": 0.0}
        for row, norm in zip(memory.rows[1:3], norms, strict=True):
            assert row == {"loss": 1.0, "lr/0": 0.5, "lr/1": 0.25, "grad_norm": pytest.approx(norm)}
        assert memory.rows[3]["lr/0"] == 7.0


def test_the_norm_is_unscaled_under_a_loss_scaler() -> None:
    """With 16-mixed too the norm is that of the gradients which the optimizer gets."""
    found = []
    for precision in ("32-true", "16-mixed"):
        monitor = GradNorm()
        with job(monitor, precision=precision) as lite:
            list(steps(lite, 1))
        found.append(float(monitor.last))  # type: ignore[arg-type]
    assert found[1] == pytest.approx(found[0], rel=1e-2)


def test_throughput_counts_what_is_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Samples and tokens of batches with a backward, per second between steps; totals go on after a resume."""
    clock = iter(range(1000))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: float(next(clock)))
    memory, meter = Memory(), Throughput(peak_flops=1e6)
    with job(meter, logger=memory) as lite:
        model = nn.Embedding(10, 2)
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        rows: Any = [torch.arange(5) for _ in range(12)]
        loader = lite.setup_dataloaders(DataLoader(rows, batch_size=4))
        for batch in loader:
            lite.backward(model(batch).sum())
            optimizer.step()
            for _ in lite.setup_dataloaders(DataLoader(rows, batch_size=6)):
                pass  # an evaluation
            lite.log("loss", 1.0)
        lite.save(tmp_path / "x", {})
    assert memory.rows[0] == {"loss": 1.0}  # the clock starts with the first step
    for row in memory.rows[1:]:
        assert row.pop("peak_memory_gb") > 0
        assert row == {"loss": 1.0, "samples_per_s": 4.0, "tokens_per_s": 20.0, "mfu": pytest.approx(6 * 20 * 20 / 1e6)}
    again = Throughput()
    with job(again) as lite:
        lite.load(tmp_path / "x", {})
        assert (again.num_samples, again.num_tokens, again.num_steps, again.seconds) == (8, 40, 3, 2.0)


# ---------------------------------------------------------------- swa, nan-guard


def test_swa_is_the_mean_of_the_weights_of_some_steps() -> None:
    """From `start` on, every few steps; before there is an average it says so."""
    swa = SWA(start=2, every=2)
    with job(swa) as lite:
        taken: list[Any] = []
        for number, (net, _, _) in enumerate(steps(lite, 6), 1):
            if number <= 3:
                with pytest.raises(OrderError, match="starts after 2 optimizer steps, and this module has made"):
                    swa.averaged(net).__enter__()
            elif number % 2 == 0:
                taken.append({name: value.clone() for name, value in net.state_dict().items()})
        own = {name: value.clone() for name, value in net.state_dict().items()}
        with swa.averaged(net):
            found = {name: value.clone() for name, value in net.state_dict().items()}
        assert all(torch.equal(value, own[name]) for name, value in net.state_dict().items())
    torch.testing.assert_close(found, {name: (taken[0][name] + taken[1][name]) / 2 for name in own})


def test_weights_that_are_loaded_after_set_up_are_where_averages_begin() -> None:
    """A pretrained model that is loaded between set-up and the first step counts, not the random one."""
    swa = SWA(start=1)
    with job(swa) as lite:
        net = network()
        net, optimizer = lite.setup(net, torch.optim.SGD(net.parameters(), lr=0.0))
        net.load_state_dict({name: torch.ones_like(value) for name, value in net.state_dict().items()})
        lite.backward(net(torch.ones(1, 4)).sum())
        optimizer.step()
        assert all(bool((value == 1).all()) for value in swa.extension_state()["averages"][0]["tensors"].values())


def test_nan_guard_raises_if_it_is_told_to() -> None:
    """With the reason, before the step."""
    with job(NaNGuard(action="raise")) as lite:
        net = network()
        net, optimizer = lite.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        lite.backward(net(torch.ones(1, 4)).sum() * math.nan)
        with pytest.raises(FloatingPointError, match="The loss is not finite: the optimizer step is not made"):
            optimizer.step()
        assert all(bool(parameter.isfinite().all()) for parameter in net.parameters())


@pytest.mark.parametrize(
    ("name", "option"), [("early-stopping", "mode=up"), ("best-model", "min-delta=-1"), ("swa", "every=0")]
)
def test_options_are_validated(monkeypatch: pytest.MonkeyPatch, name: str, option: str) -> None:
    """Before anything starts, by their names."""
    key, _, value = option.partition("=")
    variable = f"PLUGFRAME_EXTENSION__{name}__{key}".upper().replace("-", "_")
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingError, match=f"extension.{name.replace('-', '.')}.{key.replace('-', '_')}"):
        Lite(accelerator="cpu", devices=1, plugins=name)  # type: ignore[arg-type]


# ---------------------------------------------------------------- on ranks


def on_ranks(world: World, folder: str) -> tuple[Any, ...]:
    """Each rank logs another metric, trains on other data, and has another loss that is not finite."""
    stopping, best, norms = EarlyStopping(patience=2), BestModel(), GradNorm()
    rank = world.global_rank
    # Rank 1 alone would stop at the third value, and never finds an improvement after the first.
    mine = [[3.0, 2.0, 1.0, 1.5, 1.25], [1.0, 2.0, 3.0, 4.0, 5.0]][rank]
    found: list[Any] = []
    with job(stopping, best, norms, SWA(), devices=2, strategy="fsdp") as lite:
        net = network()
        net, optimizer = lite.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        for value in mine:
            optimizer.zero_grad()
            lite.backward(net(torch.full((2, 4), 1.0 + rank)).square().mean())
            optimizer.step()
            lite.log("val_loss", value)
            found.append((best.improved(), lite.should_stop, round(float(norms.last), 6)))  # type: ignore[arg-type]
        metrics = best.metrics
        lite.save(f"{folder}/x", {"net": net})
    again = EarlyStopping(patience=3)
    warnings.filterwarnings("ignore", "The checkpoint has state of extension", PlugframeWarning)
    with job(again, devices=2) as lite:
        lite.load(f"{folder}/x", {})
        if rank == 0:
            lite.log("val_loss", 9.0)  # rank 0 only
        return found, metrics, again.best, lite.should_stop


def raises_on_ranks(world: World) -> str:
    with job(NaNGuard(action="raise"), devices=2, strategy="ddp") as lite:
        net = network()
        net, optimizer = lite.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        lite.backward(net(torch.ones(1, 4)).sum() * (math.nan if world.global_rank == 1 else 1.0))
        with pytest.raises(FloatingPointError) as raised:
            optimizer.step()
    return str(raised.value)


def both(world: World, folder: str) -> tuple[Any, ...]:
    return (*on_ranks(world, folder), raises_on_ranks(world))


def test_ranks_that_see_different_values_decide_together(tmp_path: Path) -> None:
    """Rank 0's metric decides, for all; gradients have one norm; a loss of one rank raises on both."""
    first, second = run_ranks(2, both, str(tmp_path))
    assert first == second
    found, metrics, best, stopped, error = first
    assert [improved for improved, _, _ in found] == [True, True, True, False, False]
    assert [stop for _, stop, _ in found] == [False, False, False, False, True]
    assert (metrics, best, stopped) == ({"val_loss": 1.25}, 1.0, True)
    assert error.startswith("The loss is not finite on rank 1: the optimizer step is not made")
