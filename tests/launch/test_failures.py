"""Every failure of a rank is reported once, with the right rank, and ends the other ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

import failure_cases

#: Every cause once, by `plugframe run`; in each other way to start one that only the launcher sees; and a hang.
#: All others are for ``benchmarks/failures.py``.
CELLS = [
    (cause, rank, others, how)
    for cause, rank, others, how in failure_cases.cells()
    if (how == "plugframe run" and rank == (0 if cause == "background save" else 1) and others == "waiting")
    or (how == "plugframe run" and cause == "alone in a collective" and rank == 1)
    or (how != "plugframe run" and cause == "SIGKILL" and rank == 0 and others == "waiting")
    or (how == "launch(fn)" and cause == "hang" and rank == 0)
]


@pytest.mark.parametrize("failure", CELLS, ids=["-".join(map(str, cell)).replace(" ", "_") for cell in CELLS])
def test_a_failure_is_told(failure: tuple[str, int, str, str], tmp_path: Path) -> None:
    """The report has cause, rank and exit code, and at most one traceback; no processes or files remain."""
    if failure[0] == "out of memory" and (why_not := failure_cases.why_no_little_memory()):
        pytest.skip(why_not)
    problems, _ = failure_cases.check(failure, tmp_path)
    assert not problems, problems
