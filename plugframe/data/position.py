"""What a loader's position goes by, and the same place for another number of ranks or another batch size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from plugframe.errors import CheckpointMismatchError


class Layout(NamedTuple):
    """How the batches of a loader lie in the order of the epoch.

    Attributes:
        kind: what is divided between the ranks: ``"samples"`` and ``"batches"`` of a sampler, items of a
            ``"stream"``, or nothing that is known of (a reason why a place holds for this layout alone).
        size: samples in a rank's batch; 1 where whole batches are divided.
        ranks: of the data axis.
        workers: worker processes, of each of which a stream gives its own part; 0 for what is not a stream.
    """

    kind: str = "samples"
    size: int = 1
    ranks: int = 1
    workers: int = 0


class Place(NamedTuple):
    """Where in an epoch a pass begins.

    Attributes:
        position: batches a rank has read since `origin`.
        origin: what all ranks had read before, in samples or batches of a sampler.
        first: the number of the first batch after `origin`.
        elsewhere: whether it was another layout's.
    """

    position: int
    origin: int
    first: int
    elsewhere: bool = False


#: What can be counted in the order that all layouts share.
_COUNTED = ("samples", "batches", "stream")


def converted(common: Mapping[str, Any], layout: Layout) -> Place:
    """Return the place that a checkpoint holds, for a loader of this layout.

    Raises:
        CheckpointMismatchError: if there is none that reads each sample once.
    """
    position, origin, first = common["position"], common.get("origin", 0), common.get("first", 0)
    saved = Layout(*common["layout"]) if "layout" in common else layout
    inside = bool(position or origin or "layout" in common)
    if not inside or saved == layout:
        return Place(position, origin, first)
    problem = _problem(saved, layout)
    if problem:
        raise CheckpointMismatchError(
            f"A loader was saved in the middle of an epoch with {_text(saved)}, and is set up with {_text(layout)}: "
            f"{problem}, so it cannot go on with the samples that are left. Resume with {_text(saved)}, or save "
            "between epochs."
        )
    return Place(0, origin + position * saved.size * saved.ranks, first + position, elsewhere=True)


def _problem(saved: Layout, layout: Layout) -> str:
    for each in (saved, layout):
        if each.kind not in _COUNTED:
            return each.kind
    if saved.kind != layout.kind:
        return "these are counted in different ways"
    if saved.workers or layout.workers:
        return "each worker process reads its own part of a stream"
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
