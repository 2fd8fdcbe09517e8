"""Law 4 as a property: whoever is killed and when, the run that goes on ends where the uninterrupted one ends."""

from __future__ import annotations

from pathlib import Path

import pytest

import resume_cases


@pytest.mark.parametrize("seed", range(10))
def test_a_killed_run_ends_where_the_other_ends(seed: int, tmp_path: Path) -> None:
    """Model, sampler, precision, strategy, checkpoint and moments are drawn; every loss and weight is equal."""
    problems = resume_cases.check(seed, tmp_path / "case")
    assert not problems, f"{resume_cases.draw(seed)}: {problems}"
