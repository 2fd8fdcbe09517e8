"""The extension that reports where the time of a step goes: phases by a clock that the script moves, and findings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.data import DataLoader, Dataset

from plugframe import Lite, SettingError
from plugframe.cli.run import command
from plugframe_builtins.advise import clock, extension
from plugframe_builtins.advise.clock import Breakdown, Step, StepClock, breakdown
from plugframe_builtins.advise.extension import Advise
from plugframe_builtins.advise.findings import MOST, Observed, findings


class Time:
    """A clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def pass_(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(extension, "tell", lines.append)
    return lines


@pytest.fixture
def time_(monkeypatch: pytest.MonkeyPatch) -> Iterator[Time]:
    made = Time()
    with monkeypatch.context() as patch:
        patch.setattr(clock.time, "perf_counter", lambda: made.now_s)
        yield made


class Slow(Dataset[Any]):
    """Samples that take four seconds each."""

    def __init__(self, time_: Time, count: int) -> None:
        self.time, self.count = time_, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        self.time.pass_(4.0)
        return torch.ones(3)


class Model(nn.Module):
    """A forward takes a second."""

    def __init__(self, time_: Time) -> None:
        super().__init__()
        self.inner, self.time = nn.Linear(3, 1), time_

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.time.pass_(1.0)
        return self.inner(x)  # type: ignore[no-any-return]


def train(time_: Time, advise: Advise, steps: int, *, save: Path | None = None) -> None:
    with Lite(accelerator="cpu", devices=1, plugins=[advise]) as lite:
        model = Model(time_)
        model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters()))
        for number, batch in enumerate(lite.setup_dataloaders(DataLoader(Slow(time_, steps)))):
            lite.backward(model(batch).sum())
            optimizer.step()
            lite.all_reduce(torch.ones(1))
            time_.pass_(2.0)
            if number == 2:
                with torch.no_grad():
                    model(batch)
                if save is not None:
                    lite.save(save, {"model": model})


def test_the_phases_of_a_step_are_reported(time_: Time, told: list[str], tmp_path: Path) -> None:
    """Each phase has its time, a step with an evaluation and a checkpoint is left out, and the report comes once."""
    advise = Advise(steps=4, warm_up=1)
    train(time_, advise, 7, save=tmp_path / "x")
    assert advise.times is not None
    assert (advise.times.num_steps, advise.times.num_timed, advise.times.num_left_out) == (4, 3, 1)
    shown = {phase: seconds for phase, seconds in advise.times.phases.items() if seconds}
    assert shown == {clock.WAIT: 4.0, clock.FORWARD: 1.0, clock.OTHER: 2.0}
    assert told[0] == "advise: 7000.00 ms a step, of 4 steps, without 1 that save or evaluate:"
    assert told[1] == "advise:  57 % data wait"
    assert any("memory of this rank: parameters" in line for line in told)
    assert advise._slow_optimizer == "AdamW"
    assert sum("1. data wait is 57 % of the step: num_workers=0; " in line for line in told) == 1


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(4, "of 2 steps, without 1 "), (2, "nothing to report: it measures 9 steps after the first 2, and ")],
)
def test_a_run_that_ends_before_reports_what_it_has(time_: Time, told: list[str], steps: int, expected: str) -> None:
    """Or says why there is nothing, and which option helps."""
    train(time_, Advise(steps=9, warm_up=2), steps)
    assert len([line for line in told if expected in line]) == 1


def test_a_run_that_fails_ends_with_its_error(time_: Time, told: list[str]) -> None:
    """The report does not hide it."""
    lite = Lite(accelerator="cpu", devices=1, plugins=[Advise()])
    with pytest.raises(ZeroDivisionError), lite:
        raise ZeroDivisionError
    assert told == []


def test_few_steps_wait_for_a_device(time_: Time) -> None:
    """A timed step waits at the ends of its phases; work that is queued in others counts there, and phases do not."""
    queued_s, waits = [0.0], [0]

    def synchronize() -> None:
        waits[0] += 1
        time_.pass_(queued_s[0])
        queued_s[0] = 0.0

    measured = StepClock(synchronize, every=3)
    measured.begin()
    for number in range(6):
        before = waits[0]
        start_s = measured.enter(clock.FORWARD)
        time_.pass_(1.0)
        queued_s[0] += 5.0
        measured.leave(clock.FORWARD, start_s)
        measured.end_step(last=number == 5)
        # The last two of each three queue; they are waited for where the third ends.
        assert waits[0] - before == (3, 0, 1)[number % 3]
    assert [step.timed for step in measured.steps] == [True, False, False] * 2
    assert [step.seconds for step in measured.steps] == [6.0, 1.0, 11.0] * 2
    assert [dict(step.phases) for step in measured.steps[:2]] == [{clock.FORWARD: 6.0}, {}]


def test_time_of_the_host_that_is_hidden_does_not_count() -> None:
    """Where steps that do not wait are shorter, the data wait ran while the device computed."""
    timed = Step(10.0, {clock.WAIT: 4.0, clock.FORWARD: 5.0}, timed=True)
    times = breakdown([timed, Step(7.0, {}, timed=False), Step(7.0, {}, timed=False)])
    assert times.phases == {clock.WAIT: 1.0, clock.FORWARD: 5.0, clock.OTHER: 1.0}
    assert times.step_s == sum(times.phases.values()) == 7.0
    both = breakdown([Step(8.0, {clock.SAVE: 2.0}, timed=True)] * 3)  # each step saves: none is left out
    assert (both.num_left_out, both.save_part, both.part(clock.SAVE)) == (0, 0.25, 0.25)


def seen(phases: dict[str, float], *, save_part: float = 0.0, **others: Any) -> list[str]:
    times = Breakdown(step_s=100.0, phases=phases, num_steps=1, num_timed=1, num_left_out=0, save_part=save_part)
    return findings(Observed(times=times, **others))


@pytest.mark.parametrize(
    ("phases", "others", "expected"),
    [
        ({clock.WAIT: 41.0}, {"num_workers": 0, "num_cores": 8}, "data wait is 41 % of the step: num_workers=0; try 4"),
        ({clock.WAIT: 41.0}, {"num_workers": 4, "num_cores": 16}, "num_workers=4; try 8"),
        ({clock.WAIT: 41.0}, {"num_workers": 2, "num_cores": 2}, "num_workers=2 on 2 CPU cores for this rank; prepare"),
        ({clock.WAIT: 41.0}, {}, "read ahead in a thread"),
        ({clock.COPY: 10.0}, {"device": "cuda", "pin_memory": False}, "try pin_memory=True"),
        ({clock.COPY: 10.0}, {"device": "cuda", "pin_memory": True}, "send smaller types"),
        ({clock.COLLECTIVES: 30.0}, {}, "reduce several values in one call"),
        ({clock.OPTIMIZER: 30.0}, {"slow_optimizer": "AdamW"}, "try AdamW(..., fused=True)"),
        ({clock.FORWARD: 10.0, clock.BACKWARD: 80.0}, {"world_size": 2}, "backward takes 8.0 times as long as forward"),
        ({clock.FORWARD: 30.0, clock.BACKWARD: 60.0}, {"is_float32": True, "device": "cuda"}, "--precision=bf16-mixed"),
        ({clock.OTHER: 50.0}, {"device": "cuda"}, ".item() and print(loss) wait for it"),
        ({clock.OTHER: 50.0}, {}, "the script's own code (loss, metrics, logging) is 50 % of the step"),
        ({}, {"save_part": 0.2}, "checkpoints are 20 % of the time"),
        ({clock.FORWARD: 60.0}, {"peak_bytes": 1, "total_bytes": 10}, "a larger batch"),
        ({}, {"peak_bytes": 95, "total_bytes": 100}, "nearly full (95 B of 100 B)"),
    ],
)
def test_each_finding_names_the_change(phases: dict[str, float], others: dict[str, Any], expected: str) -> None:
    """One sentence, with what was found and what to try."""
    (found,) = seen(phases, **others)
    assert expected in found


def test_the_largest_findings_come_first_and_no_more_than_five() -> None:
    """Nothing is found where nothing stands out."""
    parts = {clock.WAIT: 20.0, clock.COPY: 10.0, clock.OTHER: 25.0, clock.OPTIMIZER: 12.0, clock.COLLECTIVES: 15.0}
    found = seen(parts, device="cuda", slow_optimizer="SGD", save_part=0.5, peak_bytes=95, total_bytes=100)
    assert len(found) == MOST
    assert found[0].startswith("checkpoints are 50 %")
    assert found[1].startswith("the script's own code")
    assert seen({clock.FORWARD: 30.0, clock.BACKWARD: 60.0}, world_size=2) == []


def test_it_is_an_option_of_the_command_and_its_options_are_validated() -> None:
    """`plugframe run --advise` selects it."""
    words = ["--advise", "--accelerator=cpu", "--dry-run", __file__]
    shown = CliRunner().invoke(command, words, catch_exceptions=False)
    assert (shown.exit_code, "advise (plugframe" in shown.output) == (0, True)
    with pytest.raises(SettingError, match="steps"):
        Advise(steps=0)


def test_the_part_of_the_peak_is_that_of_the_tokens_trained_on(
    time_: Time, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six operations per parameter and token, over the time of the steps; an evaluated batch does not count."""
    monkeypatch.setattr(extension, "peak_flops", lambda device: 6 * 20 * 5 / 4.0 * 2)
    with Lite(accelerator="cpu", devices=1, plugins=[Advise(steps=2, warm_up=1)]) as lite:
        model = nn.Embedding(10, 2)
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        rows: Any = [torch.arange(5) for _ in range(3)]
        for batch in lite.setup_dataloaders(DataLoader(rows)):
            lite.to_device(batch)
            lite.backward(model(lite.to_device(batch)).sum())
            optimizer.step()
            time_.pass_(4.0)
    assert any("MFU 50 %" in line for line in told)
