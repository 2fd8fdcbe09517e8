"""Measure the phases of steps, with few waits for the device."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WAIT, COPY, FORWARD, BACKWARD = "data wait", "copy to the device", "forward", "backward"
COLLECTIVES, CLIP, OPTIMIZER = "collectives of the script", "gradient clipping", "optimizer"
NO_GRAD, SAVE, OTHER = "forward without gradients", "checkpoints", "other: the script's own code"

#: Work that only some steps have, which are left out of the mean step then.
OCCASIONAL = frozenset((NO_GRAD, SAVE))

#: Work of the host that runs while the device computes, in the order in which hidden time is taken from it.
_HIDDEN = (WAIT, OTHER, COPY)


@dataclass(frozen=True)
class Step:
    """One step: its seconds, and those of its phases; of one that is not timed only occasional work is known."""

    seconds: float
    phases: Mapping[str, float]
    timed: bool


@dataclass(frozen=True)
class Breakdown:
    """The mean step.

    Attributes:
        step_s: seconds of a step.
        phases: seconds of each phase, which add up to `step_s`.
        num_steps: steps that were measured; of those, `num_timed` by phase, and `num_left_out` are not in the mean.
        save_part: the part of all time that checkpoints took.
    """

    step_s: float
    phases: Mapping[str, float]
    num_steps: int
    num_timed: int
    num_left_out: int
    save_part: float

    def part(self, phase: str) -> float:
        """Return the part of the step that a phase takes, 0 to 1."""
        return self.phases.get(phase, 0.0) / self.step_s if self.step_s else 0.0


class StepClock:
    """Time phases, nested ones excluded, from one optimizer step to the next.

    Args:
        synchronize: waits for the device; None for one that has finished when a call returns.
        every: which steps are timed by phase, waiting for the device at each boundary. Others run as without the clock.
    """

    def __init__(self, synchronize: Callable[[], None] | None, *, every: int) -> None:
        self.steps: list[Step] = []
        self._synchronize, self._every = synchronize, every
        self._thread = threading.get_ident()
        self._spent: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        self._start_s = 0.0
        self._timed = False

    def enter(self, phase: str) -> float | None:
        """Return the time at which a phase begins, for `leave`; None if it is not timed in this step."""
        if not (self._timed or phase in OCCASIONAL) or threading.get_ident() != self._thread:
            return None
        start_s = self._now(self._timed)
        self._inner.append(0.0)
        return start_s

    def leave(self, phase: str, start_s: float | None) -> None:
        """Add the time since `enter` to the phase, without phases within it."""
        if start_s is None:
            return
        seconds = self._now(self._timed) - start_s
        self._spent[phase] += seconds - self._inner.pop()
        if self._inner:
            self._inner[-1] += seconds

    def begin(self) -> None:
        """Start the first step."""
        self.steps.clear()
        self._next(self._now(True))

    def end_step(self, *, last: bool = False) -> None:
        """End a step, and start the next one unless it is the last.

        Work still queued on the device belongs to the steps before: they are waited for where the next one is timed.
        """
        timed, next_timed = self._timed, (len(self.steps) + 1) % self._every == 0
        now_s = self._now(timed or next_timed or last)
        self.steps.append(Step(now_s - self._start_s, dict(self._spent), timed))
        self._next(now_s)

    def _next(self, start_s: float) -> None:
        self._spent.clear()
        self._start_s = start_s
        self._timed = len(self.steps) % self._every == 0

    def _now(self, wait: bool) -> float:
        if wait and self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()


def breakdown(steps: Sequence[Step]) -> Breakdown:
    """Return the mean of one step or more, without those that save or evaluate, if they are fewer than half.

    The timed steps say how the time is divided, the others how long a step takes. Where the former take longer, work
    of the host is hidden behind that of the device in the others: it is taken from the phases of the host.
    """
    regular = [step for step in steps if not OCCASIONAL & step.phases.keys()]
    if 2 * len(regular) < len(steps) or not any(step.timed for step in regular):
        regular = list(steps)
    timed = [step for step in regular if step.timed]
    step_s = _mean([step for step in regular if not step.timed] or timed)
    phases: dict[str, float] = defaultdict(float)
    for step in timed:
        for phase, seconds in step.phases.items():
            phases[phase] += seconds / len(timed)
    phases[OTHER] = max(_mean(timed) - sum(phases.values()), 0.0)
    hidden_s = sum(phases.values()) - step_s
    for phase in _HIDDEN:
        cut_s = min(max(hidden_s, 0.0), phases[phase])
        phases[phase] -= cut_s
        hidden_s -= cut_s
    total_s = sum(phases.values())
    scale = step_s / total_s if total_s else 0.0
    return Breakdown(
        step_s=step_s,
        phases={phase: seconds * scale for phase, seconds in phases.items() if seconds > 0},
        num_steps=len(steps),
        num_timed=len(timed),
        num_left_out=len(steps) - len(regular),
        save_part=sum(step.phases.get(SAVE, 0.0) for step in steps) / (sum(step.seconds for step in steps) or 1.0),
    )


def _mean(steps: Sequence[Step]) -> float:
    return sum(step.seconds for step in steps) / len(steps)
