"""Ranks killed while they replace a checkpoint leave the old or the new one intact, for every format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paths import BENCHMARKS

_SCRIPT = BENCHMARKS / "kill_during_save.py"
_SHARED_MEMORY = "/dev/shm"


@pytest.mark.parametrize("killed", ["one of 2", "all of 2"])
def test_no_kill_costs_a_checkpoint_or_mixes_two(tmp_path: Path, killed: str) -> None:
    """At random moments, with the temporary folder elsewhere: none lost or mixed, nothing left, no hang."""
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    if os.path.isdir(_SHARED_MEMORY) and os.stat(_SHARED_MEMORY).st_dev != os.stat(tmp_path).st_dev:
        elsewhere = Path(_SHARED_MEMORY)
    command = [sys.executable, str(_SCRIPT), "--kills=2", "--size-mb=2", f"--folder={tmp_path}", f"--tmp={elsewhere}"]
    done = subprocess.run(
        [*command, "--killed", killed, "--json"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert sum(row["kills"] for row in rows) == 10
    for row in rows:
        assert row["old"] + row["new"] == row["kills"], (row, done.stderr)
        assert (row["lost"], row["mixtures"], row["leftovers"], row["stuck"]) == (0, 0, 0, 0), (row, done.stderr)
