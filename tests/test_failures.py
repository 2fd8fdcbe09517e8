"""Whatever ends a rank is told once, with the right rank, and takes the others with it."""

from __future__ import annotations

from pathlib import Path

import pytest

import failure_cases

#: Every cause once, by `plugframe run`; and in each other way to start, one that Python tells and one that it cannot.
CELLS = [
    cell
    for cell in failure_cases.cells()
    if (cell[3] == "plugframe run" and cell[1] == (0 if cell[0] == "background save" else 1))
    or (cell[0] in ("exit 3", "SIGKILL", "hang") and cell[1] == 0 and cell[2] == "waiting")
]


@pytest.mark.parametrize("cell", CELLS, ids=["-".join(map(str, cell)).replace(" ", "_") for cell in CELLS])
def test_a_failure_is_told(cell: tuple[str, int, str, str], tmp_path: Path) -> None:
    """Cause, rank and exit code; at most one traceback; nobody and nothing is left behind."""
    problems, _ = failure_cases.check(cell, tmp_path)
    assert not problems, problems
