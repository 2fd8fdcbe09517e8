"""A run resumed with another number of ranks or another batch size reads each sample of the epoch once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import resume_ranks_cases as cases
from plugframe import CheckpointMismatchError
from plugframe.data.position import Layout, ResumePoint, resume_point
from ranks import run_ranks

SIZE, STOP = 2, 4
KINDS = (
    *("shuffled", "shuffled, drop last", "shuffled, workers", "weighted", "batch sampler", "own batches", "stream"),
    "stream, placed",
)
REFUSED = {
    "own loader": "its __iter__ decides what it reads",
    "stream, workers": "each worker process reads its own shard of a stream",
}
#: Saved by, then loaded (and saved once more) by, then loaded by so many ranks.
ROUTES = {"1 to 2": (1, 2, 2), "2 to 3 to 1": (2, 3, 1)}


def plan_of(ranks: int, stage: int) -> cases.Plan:
    """Return the steps of `ranks` at a stage of every route: read and save, resume and save, resume to the end."""
    plan: cases.Plan = []
    for route, numbers in ROUTES.items():
        kinds = KINDS if stage == 2 else (*KINDS, *REFUSED)
        for kind in kinds if numbers[stage] == ranks else ():
            file = f"{route}-{kind}".replace(", ", "-")
            # The last stage reads batches of another size, unless a sampler of the user's makes them.
            size = SIZE + (stage == 2 and kind != "own batches")
            files = {"load": f"{file}-{stage - 1}" if stage else None, "save": f"{file}-{stage}"}
            stop = [STOP, 2, None][stage]
            plan.append((f"{route}, {kind}", {"kind": kind, "size": size, "stop": stop, **files}))
    return plan


def go(folder: Path, stage: int) -> dict[str, list[Any]]:
    """Return the samples of every rank at a stage, by route and loader."""
    found: dict[str, list[Any]] = {}
    for ranks in sorted({numbers[stage] for numbers in ROUTES.values()}):
        results = run_ranks(ranks, cases.go_through, str(folder), plan_of(ranks, stage))
        found.update({name: [result[name] for result in results] for name in results[0]})
    return found


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return [go(folder, stage) for stage in range(3)]


def samples(of_ranks: list[Any], epoch: int) -> list[int]:
    return [sample for epochs in of_ranks for batch in epochs[epoch] for sample in batch]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_ranks_reads_each_sample_once(
    stages: list[dict[str, list[Any]]], kind: str, route: str
) -> None:
    """The samples of all stages are the epoch: none twice, none missing."""
    first, second, last = (stage[f"{route}, {kind}"] for stage in stages)
    once = Counter(samples(first, 0)) + Counter(samples(second, 0)) + Counter(samples(last, 0))
    if "drop" in kind:
        assert set(once.values()) == {1}
        assert cases.NUMBER - len(once) < (SIZE + 1) * ROUTES[route][2]
    elif kind == "weighted":  # some are drawn more than once, the same ones on any number of ranks
        others = [stage[f"{other}, {kind}"] for other in ROUTES for stage in stages]
        assert sum(once.values()) == cases.NUMBER
        assert once + once == sum((Counter(samples(each, 0)) for each in others), Counter())
    else:
        assert once == Counter(samples(last, 1)) == Counter(range(cases.NUMBER))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_place_that_cannot_be_converted_is_refused(stages: list[dict[str, list[Any]]], kind: str) -> None:
    """A position in a custom loader is refused on all ranks, with a remedy."""
    for error in stages[1][f"1 to 2, {kind}"]:
        assert REFUSED[kind] in error
        assert "saved in the middle of an epoch with 1 rank" in error
        assert "Resume with 1 rank" in error


def test_places_are_counted_in_what_all_layouts_share() -> None:
    """Positions count batches of a rank from an origin in samples of all ranks."""
    saved = {"position": 3, "origin": 10, "first": 2, "layout": ["samples", 4, 2, 0]}
    assert resume_point(saved, Layout("samples", 4, 2)) == ResumePoint(3, 10, 2)
    assert resume_point(saved, Layout("samples", 3, 5)) == ResumePoint(0, 34, 5, other_layout=True)
    ended = {"position": 0, "epoch": 4}
    assert resume_point(ended, Layout("its sampler divides the data itself", 4, 2)) == ResumePoint(0, 0, 0)
    with pytest.raises(CheckpointMismatchError, match="one counts samples, the other batches"):
        resume_point(saved, Layout("batches", 1, 2))


def test_numbers_of_each_rank_go_on_exactly(tmp_path: Path) -> None:
    """With per_rank=True a resumed run draws the same numbers on every rank (law 4)."""
    whole = run_ranks(2, cases.numbers_drawn, str(tmp_path), "x", False)
    rest = run_ranks(2, cases.numbers_drawn, str(tmp_path), "x", True)
    assert [each[3:] for each in whole] == rest
    assert whole[0] != whole[1]
    wider = run_ranks(3, cases.numbers_drawn, str(tmp_path), "x", True)
    assert [each[0] for each in wider[:2]] == [each[0] for each in rest]
    assert len({tuple(each[0]) for each in wider}) == 3
