"""The schedules of torch, by name, and those of others, by class."""

from __future__ import annotations

import importlib
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
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from plugframe.errors import SettingError, UnsupportedError
from plugframe_builtins.pipeline.axis import Axis
from plugframe_builtins.pipeline.stage import Meta, StageModule

#: Schedules that run several stages on a rank.
_SEVERAL: dict[str, Callable[..., Any]] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
#: Names of schedules.
NAMES = ("gpipe", "1f1b", *_SEVERAL)


def is_class(name: str | None) -> bool:
    """Return whether `name` has the form ``package.module:Class``."""
    return name is not None and ":" in name


def check_name(name: str) -> None:
    """Raise if there is no such schedule.

    Raises:
        SettingError: for a name that is none, and a class that cannot be imported or is no schedule of torch.
    """
    if is_class(name):
        import_class(name)
    elif name not in NAMES:
        raise SettingError(
            f"schedule={name!r} of strategy 'pipeline' must be one of {', '.join(NAMES)}, or 'package.module:Class'."
        )


def import_class(name: str) -> Any:
    """Return the class ``package.module:Class``.

    Raises:
        SettingError: if it cannot be imported, or is no schedule of torch.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the module of a stranger raises
        words = " ".join(str(error).split()).rstrip(".")
        raise SettingError(
            f"schedule={name!r} of strategy 'pipeline' cannot be imported: {type(error).__name__}: {words}. Name an "
            "installed 'package.module:Class'."
        ) from error
    if not (isinstance(found, type) and issubclass(found, (PipelineScheduleSingle, PipelineScheduleMulti))):
        raise SettingError(
            f"schedule={name!r} of strategy 'pipeline' is no schedule: name a subclass of PipelineScheduleSingle or "
            "PipelineScheduleMulti of torch.distributed.pipelining.schedules."
        )
    return found


def _runs_several(name: str) -> bool:
    return name in _SEVERAL or (is_class(name) and issubclass(import_class(name), PipelineScheduleMulti))


def misfit(name: str, *, stages: int, ranks: int, micro_batches: int) -> str | None:
    """Return why torch's schedule cannot run so many stages or micro-batches, None if it can."""
    if stages % ranks:
        return f"stages={stages} is no multiple of the {ranks} ranks"
    if stages != ranks and not _runs_several(name):
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
    full: bool = True,
) -> Any:
    """Return torch's schedule, or one that keeps autograd's order if it cannot run `count` micro-batches.

    Args:
        boundaries: what each stage sends to the next.
        loss: of one micro-batch, on the meta device.
        full: whether these are all micro-batches of a batch, and not the fewer ones of an odd batch; a class given by
            the user must be able to run all of them.

    Raises:
        SettingError: if a class given by the user cannot run the stages and micro-batches.
        UnsupportedError: if it wants the stages on other ranks.
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
    if is_class(name):
        made = _make_given(name, stages, axis, full, options)
        if made is not None:
            return made
    fits = misfit(name, stages=num_stages, ranks=axis.size, micro_batches=count) is None
    if name in _SEVERAL and fits:
        return _SEVERAL[name](stages, **options)
    if len(stages) > 1:
        return ScheduleLoopedBFS(stages, **options)
    return (Schedule1F1B if name == "1f1b" and fits else ScheduleGPipe)(stages[0], **options)


def _make_given(name: str, stages: Sequence[Any], axis: Axis, full: bool, options: dict[str, Any]) -> Any:
    """Return a schedule of the class `name`; None if it cannot run the fewer micro-batches of an odd batch."""
    cls, count, num_stages = import_class(name), options["n_microbatches"], stages[0].num_stages
    try:
        schedule = cls(list(stages) if _runs_several(name) else stages[0], **options)
    except (TypeError, ValueError, AssertionError) as error:
        if not full and isinstance(error, ValueError):
            return None
        words = " ".join(str(error).split()).rstrip(".")
        raise SettingError(
            f"schedule={name!r} of strategy 'pipeline' cannot run {num_stages} stages on {axis.size} ranks in "
            f"micro_batches={count}: {type(error).__name__}: {words}."
        ) from error
    placed = getattr(schedule, "stage_index_to_group_rank", {})
    ranks = [placed[stage] for stage in sorted(placed)]
    if ranks not in ([], [stage % axis.size for stage in range(num_stages)]):
        raise UnsupportedError(
            f"schedule={name!r} puts the stages on ranks {ranks}, and strategy 'pipeline' puts stage n on rank n % "
            f"{axis.size}: use a schedule that loops over the ranks, such as 'interleaved'."
        )
    return schedule


def _weighed(loss: Tensor, weight: Tensor) -> Tensor:
    """Return a micro-batch's share of the loss of the batch."""
    return loss * weight.squeeze(0).to(loss.dtype)
