"""Ranks in processes that exist already, as the actors of a pool do."""

from __future__ import annotations

import multiprocessing
import os
import socket
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from plugframe import Lite, Plugin, UsageError, World, hookimpl
from plugframe.base import Launcher
from plugframe.hooks import Job
from plugframe.launch import Rendezvous, run_as_rank
from plugframe.testing.fakes import cluster_variables
from plugframe.utils.environment import environment

pytestmark = pytest.mark.ranks


class Pool(Launcher):
    """Runs the ranks of a function in the workers of a pool, one after the other job in the same workers."""

    plugin = Plugin(factory=f"{__name__}:Pool", provides=("function",))

    def __init__(self, executor: ProcessPoolExecutor | None) -> None:
        self.executor = executor

    def __reduce__(self) -> Any:
        return Pool, (None,)  # a worker needs no pool

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        assert self.executor is not None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            rendezvous = Rendezvous(address="127.0.0.1", port=free.getsockname()[1])
        size = job.num_processes
        worlds = [World(global_rank=k, local_rank=k, world_size=size, local_world_size=size) for k in range(size)]
        results = [self.executor.submit(run_as_rank, job, world, rendezvous) for world in worlds]
        first, *_ = [result.result(timeout=120) for result in results]
        return first


def train(lite: Lite) -> dict[str, Any]:
    model = lite.setup(torch.nn.Linear(2, 1))
    lite.backward(model(torch.full((1, 2), float(lite.global_rank))).sum())
    gradient = model.weight.grad
    assert gradient is not None
    return {
        "ranks": lite.all_gather(torch.tensor(lite.global_rank)).tolist(),
        "gradient": gradient.tolist(),
        "process": os.getpid(),
    }


def names_of_ranks(_: int) -> list[str]:
    return sorted({"RANK", "WORLD_SIZE", "MASTER_PORT", "PLUGFRAME_RANK"} & set(os.environ))


def test_workers_of_a_pool_become_ranks() -> None:
    """The numbers are those of a job, and a worker is what it was afterwards: it serves the next job."""
    # A process that has been a rank leaves its mark to the programs that it starts: the workers have it from the start.
    with environment(cluster_variables(num_nodes=1, ranks_per_node=1, rank=0)), Lite(accelerator="cpu"):
        pass
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        # Both workers are started before the first job, so that each gets a rank.
        before = list(executor.map(names_of_ranks, range(2), chunksize=1))
        assert before == [["PLUGFRAME_RANK"], ["PLUGFRAME_RANK"]]
        for _ in range(2):
            lite = Lite(accelerator="cpu", devices=2, strategy="ddp", launcher=Pool(executor))
            found = lite.launch(train)
            assert found["ranks"] == [0, 1]
            assert found["gradient"] == [[0.5, 0.5]]
            assert found["process"] != os.getpid()
        assert list(executor.map(names_of_ranks, range(2), chunksize=1, timeout=60)) == before


def test_a_script_cannot_be_run_in_a_process() -> None:
    """It takes a function."""
    with pytest.raises(UsageError, match="takes a job with a function, and this one runs a script"):
        run_as_rank(Job(num_processes=1, command=("train.py",)), World(), Rendezvous(address="x", port=1))


def test_a_secret_is_not_printed() -> None:
    """The token of a rendezvous differs between jobs, and is no part of its text."""
    first, second = (Rendezvous(address="x", port=1) for _ in range(2))
    assert first.token != second.token
    assert first.token not in repr(first)
