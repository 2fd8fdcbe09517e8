"""Under lockstep every divergence is one error on all ranks, which names rank and line."""

from __future__ import annotations

from functools import lru_cache

import pytest

from divergence_mistakes import MISTAKES, marked, run_all
from ranks import run_ranks


@lru_cache(maxsize=1)
def told() -> list[dict[str, tuple[str, str, float]]]:
    """Return the report of each mistake on each rank; one job makes all of them."""
    return run_ranks(2, run_all, ("lockstep",))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda function: function.__name__)
def test_a_mistake_is_named_with_rank_and_line(mistake) -> None:  # type: ignore[no-untyped-def]
    """The first difference is an error on all ranks that says who was to do what at which line, and what it may be."""
    found = [report[mistake.__name__] for report in told()]
    early = mistake.__name__ == "a_rank_stops_early"
    texts = [text for kind, text, _ in found if kind]
    assert len(texts) == (1 if early else 2), found
    assert {kind for kind, _, _ in found if kind} <= {"CollectiveMismatchError", "RankLostError"}
    for text in texts:
        for said in MISTAKES[mistake]:
            assert said in text
    longest = max(texts, key=len)
    for rank in (0, 1):
        assert f"rank {rank}" in longest
        for site in marked(mistake, rank):
            assert site in longest
