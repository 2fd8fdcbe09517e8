"""Processes that were started by hand, one for each rank: one job, or an error that says what is missing."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plugframe import Lite
from plugframe.errors import EnvironmentMismatchError
from plugframe.hooks.world import World

OURS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
FAR = {"MASTER_ADDR": "node0", "MASTER_PORT": "29501"}


def made(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], **settings: Any) -> Lite:
    """Return a Lite in a process with these variables."""
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Lite(accelerator="cpu", **settings)


@pytest.mark.parametrize(
    ("variables", "settings", "place"),
    [
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", **MEET}, {}, (1, 1, 0, 2, 2, 1)),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29501"}, {}, (1, 1, 0, 2, 2, 1)),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", **MEET}, {}, (1, 1, 0, 2, 2, 1)),
        ({"LOCAL_RANK": "1", **MEET}, {"devices": 2}, (1, 1, 0, 2, 2, 1)),
        ({"LOCAL_RANK": "0", "MASTER_PORT": "29501"}, {"devices": 2}, (0, 0, 0, 2, 2, 1)),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1", **FAR}, {"devices": 2, "num_nodes": 2}, (2, 0, 1, 4, 2, 2)),
        ({"LOCAL_RANK": "1", "NODE_RANK": "1", "WORLD_SIZE": "4", **FAR}, {"devices": 2}, (3, 1, 1, 4, 2, 2)),
        ({"LOCAL_RANK": "1", "GROUP_RANK": "1", "WORLD_SIZE": "4", **FAR}, {"num_nodes": 2}, (3, 1, 1, 4, 2, 2)),
        ({"LOCAL_RANK": "1", "RANK": "3", **FAR}, {"devices": 2, "num_nodes": 2}, (3, 1, 1, 4, 2, 2)),
        ({"RANK": "3", "WORLD_SIZE": "4", **FAR}, {"devices": 2}, (3, 1, 1, 4, 2, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", **MEET}, {}, (1, 1, 0, 2, 2, 1)),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, {}, (0, 0, 0, 1, 1, 1)),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, {"devices": 1}, (0, 0, 0, 1, 1, 1)),
    ],
)
def test_processes_started_by_hand_are_one_job(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], settings: dict[str, Any], place: tuple[int, ...]
) -> None:
    """What the variables leave open comes from devices= and num_nodes=."""
    lite = made(monkeypatch, variables, **settings)
    fields = ("global_rank", "local_rank", "node_rank", "world_size", "local_world_size", "num_nodes")
    assert lite.plan.world == World(**dict(zip(fields, place, strict=True)))
    assert lite.plan.choices["environment"].name == "manual"
    lite.teardown()


@pytest.mark.parametrize(
    ("variables", "settings", "missing"),
    [
        ({"LOCAL_RANK": "0", **MEET}, {}, "WORLD_SIZE is not set, and no devices="),
        ({"LOCAL_RANK": "1"}, {}, "WORLD_SIZE is not set, and no devices="),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1", **FAR}, {}, "WORLD_SIZE is not set, and no devices="),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, {}, "MASTER_PORT is not set, on which 2 ranks"),
        ({"LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}, {"devices": 2}, "MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, {}, "MASTER_PORT is not set"),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "4", **FAR}, {}, "neither devices= nor LOCAL_WORLD_SIZE"),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "4", "NODE_RANK": "1", **MEET}, {}, "neither devices= nor LOCAL_WORLD_SIZE"),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "4", **FAR}, {"devices": 2}, "NODE_RANK is not set"),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1", "MASTER_PORT": "29501"}, {"devices": 2, "num_nodes": 2}, "MASTER_ADDR"),
        ({"LOCAL_RANK": "2", **MEET}, {"devices": 2}, "LOCAL_RANK=2 is not at least 0"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", **MEET}, {"devices": 1}, "NODE_RANK is not set"),
        (
            {"LOCAL_RANK": "1", "RANK": "2", **FAR},
            {"devices": 2, "num_nodes": 2},
            "RANK=2 is not the rank of LOCAL_RANK",
        ),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "3", **MEET}, {"devices": 2}, "WORLD_SIZE=3 processes are not some nodes"),
        ({"LOCAL_RANK": "x", **MEET}, {"devices": 2}, "LOCAL_RANK='x' is not an integer"),
    ],
)
def test_what_is_missing_is_an_error(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], settings: dict[str, Any], missing: str
) -> None:
    """On every rank, also on rank 0, which would train alone."""
    with pytest.raises(EnvironmentMismatchError, match=re.escape(missing)):
        made(monkeypatch, variables, **settings)


@pytest.mark.parametrize("variables", [{}, MEET, {"LOCAL_RANK": "0"}, {"NODE_RANK": "0", **FAR}, {"RANK": "0"}])
def test_what_says_nothing_of_ranks_is_passed_over(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Where to meet, and what libraries leave behind; and whoever says environment='local' means it."""
    assert made(monkeypatch, variables).plan.choices["environment"].name == "local"
    lite = made(monkeypatch, {"LOCAL_RANK": "1", "WORLD_SIZE": "2", **MEET}, environment="local")
    assert not lite.plan.launched


def test_numbers_of_nodes_are_no_ranks_to_the_command(tmp_path: Path) -> None:
    """A platform that numbers nodes by RANK and WORLD_SIZE: `plugframe run` with them starts the ranks of this node."""
    (tmp_path / "train.py").write_text("")
    words = ["--num-nodes=2", "--node-rank=1", "--main-address=node0", "--devices=2", "--accelerator=cpu", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-m", "plugframe", "run", "train.py", *words],
        cwd=tmp_path,
        env={**os.environ, "RANK": "1", "WORLD_SIZE": "2", **FAR},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks of python train.py" in done.stdout
    assert "node 1 of 2, main node0" in done.stdout


TRAIN = """
import sys
from plugframe import Lite

lite = Lite(accelerator="cpu", **eval(sys.argv[1]))
lite.launch()
print(lite.all_reduce(lite.global_rank + 1.0, reduce_op="sum").item(), lite.world_size)
"""


def test_two_shells_make_a_job(tmp_path: Path) -> None:
    """Fabric's variables, the number of ranks from devices=: both sum over both."""
    (tmp_path / "train.py").write_text(TRAIN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shells = [
        subprocess.Popen(
            [sys.executable, "train.py", "{'devices': 2}"],
            cwd=tmp_path,
            env={**os.environ, "LOCAL_RANK": str(rank), "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [shell.communicate(timeout=100)[0] for shell in shells] == ["3.0 2\n", "3.0 2\n"]
