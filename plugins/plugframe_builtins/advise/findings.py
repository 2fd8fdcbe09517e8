"""Say what would make a step faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from plugframe.base import size_text
from plugframe_builtins.advise import clock
from plugframe_builtins.advise.clock import Breakdown

#: How many findings are reported, those about most of the time.
MOST = 5


@dataclass(frozen=True)
class Observed:
    """What findings are drawn from.

    Attributes:
        num_workers, pin_memory: of the loader that was read; None for one that is not torch's.
        num_cores: CPU cores for each rank of this machine.
        slow_optimizer: the class of an optimizer that has a fused form and does not use it, or "".
        is_float32: whether the precision is float32 on a device that computes in bfloat16.
        peak_bytes, total_bytes: memory used at the peak and there is on the device; 0 where that is not known.
    """

    times: Breakdown
    device: str = "cpu"
    world_size: int = 1
    num_cores: int = 1
    num_workers: int | None = None
    pin_memory: bool | None = None
    slow_optimizer: str = ""
    is_float32: bool = False
    peak_bytes: int = 0
    total_bytes: int = 0


def findings(observed: Observed) -> list[str]:
    """Return at most five sentences, those about most of the time first."""
    found = sorted((*_of_host(observed), *_of_device(observed)), key=lambda each: -each[0])
    return [text for _, text in found[:MOST]]


def _of_host(observed: Observed) -> Iterator[tuple[float, str]]:
    """Yield the part of a step that a finding is about, and the finding."""
    times = observed.times
    wait, copy, other = times.part(clock.WAIT), times.part(clock.COPY), times.part(clock.OTHER)
    if wait >= 0.1:
        yield wait, f"data wait is {_percent(wait)} of the step: {_about_workers(observed)}"
    if copy >= 0.05 and observed.device != "cpu":
        hint = "send smaller types (uint8 images) and convert them on the device"
        if observed.pin_memory is False:
            hint = "the loader's pin_memory is False; try pin_memory=True"
        yield copy, f"the copy to the device is {_percent(copy)} of the step: {hint}"
    if other >= 0.2:
        hint = "compute metrics and log every 10th step"
        if observed.device != "cpu":
            hint += ", and sum losses on the device: .item() and print(loss) wait for it"
        yield other, f"the script's own code (loss, metrics, logging) is {_percent(other)} of the step: {hint}"
    if times.save_part >= 0.05:
        hint = "save less often, or with lite.save(..., wait=False), which writes in the background"
        yield times.save_part, f"checkpoints are {_percent(times.save_part)} of the time: {hint}"


def _of_device(observed: Observed) -> Iterator[tuple[float, str]]:
    """Yield likewise what is about computing and communicating."""
    times = observed.times
    forward, backward = times.part(clock.FORWARD), times.part(clock.BACKWARD)
    optimizer, collectives = times.part(clock.OPTIMIZER), times.part(clock.COLLECTIVES)
    if collectives >= 0.1:
        hint = "reduce several values in one call, or every 10th step"
        yield collectives, f"collectives of the script are {_percent(collectives)} of the step: {hint}"
    if optimizer >= 0.1 and observed.slow_optimizer:
        name = observed.slow_optimizer
        yield optimizer, f"the optimizer is {_percent(optimizer)} of the step: try {name}(..., fused=True)"
    if observed.world_size > 1 and forward > 0 and backward > 4 * forward and backward >= 0.3:
        hint = "gradients may wait for other ranks or the network; try a larger batch, or lite.no_backward_sync"
        text = f"backward takes {backward / forward:.1f} times as long as forward, about 2 is usual: {hint}"
        yield backward - 2 * forward, text
    if observed.is_float32 and forward + backward >= 0.4:
        hint = f"the precision is float32 and {observed.device} computes in bfloat16; try --precision=bf16-mixed"
        yield forward + backward, f"forward and backward are {_percent(forward + backward)} of the step: {hint}"
    used = observed.peak_bytes / observed.total_bytes if observed.total_bytes else 0.5
    sizes = f"{size_text(observed.peak_bytes)} of {size_text(observed.total_bytes)}"
    if used >= 0.9:
        yield 0.05, f"the memory of the device is nearly full ({sizes}): activation checkpointing, or --oom-retry"
    elif used < 0.4 and forward + backward + optimizer >= 0.5:
        yield 0.05, f"the peak of memory is {sizes}: a larger batch may use the device better"


def _about_workers(observed: Observed) -> str:
    workers, cores = observed.num_workers, observed.num_cores
    if workers is None:
        return "read ahead in a thread or process, or with a torch DataLoader and num_workers"
    if workers >= cores:
        return (
            f"num_workers={workers} on {cores} CPU {'core' if cores == 1 else 'cores'} for this rank; "
            "prepare the samples once and store them, or use a faster format"
        )
    return f"num_workers={workers}; try {min(max(2 * workers, 4), cores)}"


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"
