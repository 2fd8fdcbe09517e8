"""Positions of loaders, and their conversion to another number of ranks or another batch size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from plugframe.errors import CheckpointMismatchError


class Layout(NamedTuple):
    """How an epoch is divided into the batches of a loader.

    Attributes:
        kind: what is divided between the ranks: ``"samples"`` or ``"batches"`` of a sampler, or items of a
            ``"stream"``. Any other value is the reason why a position holds for this layout only.
        size: samples in a rank's batch; 1 where complete batches are divided.
        ranks: ranks of the data axis.
        workers: worker processes, where each reads its own shard of a stream; 0 for others.
    """

    kind: str = "samples"
    size: int = 1
    ranks: int = 1
    workers: int = 0


class ResumePoint(NamedTuple):
    """Where in an epoch a pass begins.

    Attributes:
        position: batches that a rank has read since `origin`.
        origin: what all ranks had read before, in samples or batches of a sampler.
        first: number of the first batch after `origin`.
        other_layout: whether it was converted from another layout.
    """

    position: int
    origin: int
    first: int
    other_layout: bool = False


#: Kinds that count positions in an order common to all layouts.
_CONVERTIBLE = ("samples", "batches", "stream")


def resume_point(common: Mapping[str, Any], layout: Layout) -> ResumePoint:
    """Return the position in a checkpoint, converted to `layout`.

    Raises:
        CheckpointMismatchError: if no such position reads each sample once.
    """
    position, origin, first = common["position"], common.get("origin", 0), common.get("first", 0)
    saved = Layout(*common["layout"]) if "layout" in common else layout
    inside = bool(position or origin or "layout" in common)
    if not inside or saved == layout:
        return ResumePoint(position, origin, first)
    problem = _problem(saved, layout)
    if problem:
        raise CheckpointMismatchError(
            f"A loader was saved in the middle of an epoch with {_text(saved)}, and is set up with {_text(layout)}: "
            f"{problem}, so it cannot resume with the remaining samples. Resume with {_text(saved)}, or save "
            "between epochs."
        )
    return ResumePoint(0, origin + position * saved.size * saved.ranks, first + position, other_layout=True)


def _problem(saved: Layout, layout: Layout) -> str:
    for each in (saved, layout):
        if each.kind not in _CONVERTIBLE:
            return each.kind
    if saved.kind != layout.kind:
        return f"one counts {saved.kind}, the other {layout.kind}"
    if saved.workers or layout.workers:
        return "each worker process reads its own shard of a stream"
    return ""


def _text(layout: Layout) -> str:
    texts = [f"{layout.ranks} rank{'s' * (layout.ranks != 1)}"]
    if layout.kind in ("samples", "stream"):
        texts.append(f"batch_size={layout.size}")
    elif layout.kind == "batches":
        texts.append("a batch sampler")
    if layout.workers:
        texts.append(f"num_workers={layout.workers}")
    return ", ".join(texts)
