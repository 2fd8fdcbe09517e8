"""The schedules of torch, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)

from plugframe_builtins.pipeline.axis import Axis
from plugframe_builtins.pipeline.stage import Meta, StageModule

#: Schedules that run several stages on a rank.
_SEVERAL: dict[str, Callable[..., Any]] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}


def misfit(name: str, *, stages: int, ranks: int, micro_batches: int) -> str | None:
    """Return why torch's schedule cannot run so many stages or micro-batches, None if it can."""
    if stages % ranks:
        return f"stages={stages} is no multiple of the {ranks} ranks"
    if name not in _SEVERAL and stages != ranks:
        return f"stages={stages} on {ranks} ranks gives each several stages, which 'interleaved' and 'zero_bubble' run"
    if name == "1f1b" and micro_batches < stages:
        return f"micro_batches={micro_batches} are fewer than the {stages} stages"
    if name in _SEVERAL and micro_batches % max(1, micro_batches // ranks):
        return (
            f"micro_batches={micro_batches} cannot be divided into {max(1, micro_batches // ranks)} equal rounds over "
            f"{ranks} ranks"
        )
    return None


def make_schedule(
    name: str,
    modules: Sequence[StageModule],
    boundaries: Sequence[Sequence[Meta]],
    loss: Tensor,
    count: int,
    axis: Axis,
) -> Any:
    """Return torch's schedule, or one that keeps autograd's order if it cannot run `count` micro-batches.

    Args:
        boundaries: what each stage sends to the next.
        loss: of one micro-batch, on the meta device.
    """
    num_stages = len(boundaries) + 1

    def examples(metas: Sequence[Meta]) -> tuple[Tensor, ...]:
        return tuple(
            torch.empty(meta.shape, dtype=meta.dtype, device="meta", requires_grad=meta.requires_grad) for meta in metas
        )

    stages: list[Any] = [
        PipelineStage(
            module,
            module.stage,
            num_stages,
            axis.device,
            input_args=examples(boundaries[module.stage - 1]) if module.stage else (),
            output_args=examples(boundaries[module.stage]) if module.stage < num_stages - 1 else (loss,),
            group=axis.group,
        )
        for module in modules
    ]
    options: dict[str, Any] = {"n_microbatches": count, "loss_fn": _weighed, "scale_grads": False}
    fits = misfit(name, stages=num_stages, ranks=axis.size, micro_batches=count) is None
    if name in _SEVERAL and fits:
        return _SEVERAL[name](stages, **options)
    if len(stages) > 1:
        return ScheduleLoopedBFS(stages, **options)
    return (Schedule1F1B if name == "1f1b" and fits else ScheduleGPipe)(stages[0], **options)


def _weighed(loss: Tensor, weight: Tensor) -> Tensor:
    """Return a micro-batch's share of the loss of the batch."""
    return loss * weight.squeeze(0).to(loss.dtype)
