"""With ``--max-restarts`` a job continues after any failure of a rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import restart_cases
import warm


@pytest.mark.parametrize("cause", restart_cases.CAUSES)
def test_a_job_goes_on(cause: str, tmp_path: Path) -> None:
    """The job restarts once, prints one line, and resumes from its last checkpoint."""
    problems, _ = restart_cases.check(cause, 1, tmp_path)
    assert not problems, problems


@pytest.mark.slow
def test_many_jobs_begin_at_once(tmp_path: Path) -> None:
    """Jobs on one machine share no port."""
    script = tmp_path / "train.py"
    script.write_text("from torch.distributed import TCPStore\nimport os\nprint(os.environ['MASTER_PORT'])\n")
    command = [sys.executable, "-m", "plugframe", "run", "--devices=2", str(script)]
    jobs = [
        warm.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(5)
    ]
    ports = []
    for job in jobs:
        out, said = job.communicate(timeout=180)
        assert job.returncode == 0, said
        ports.append(set(out.split()))
    assert all(len(each) == 1 for each in ports)
    assert len(set.union(*ports)) == len(jobs)
