"""Law 4 as a property: whichever rank is killed, at any step, the resumed run ends where the uninterrupted one ends."""

from __future__ import annotations

from pathlib import Path

import pytest

import resume_cases


@pytest.mark.parametrize("seed", range(6))
def test_a_killed_run_ends_where_the_other_ends(seed: int, tmp_path: Path) -> None:
    """Every loss and weight is equal for random models, samplers, precisions, strategies, checkpoints and steps."""
    problems = resume_cases.check(seed, tmp_path / "case")
    assert not problems, f"{resume_cases.draw(seed)}: {problems}"
