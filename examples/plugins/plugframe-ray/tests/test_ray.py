"""The launcher: ranks in actors train as one job; what cannot be launched is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("ray", reason="ray is not installed: pip install ray")

from plugframe_ray.launcher import Ray, worlds

from plugframe import Lite, UsageError
from plugframe.hooks import Job


def test_ranks_of_actors_train_as_one_job() -> None:
    """A function defined here averages gradients over ranks, and its result on rank 0 is returned."""
    held = {"here": 3}

    def train(lite: Lite) -> dict[str, Any]:
        model = lite.setup(torch.nn.Linear(2, 1))
        lite.backward(model(torch.full((1, 2), float(lite.global_rank))).sum())
        assert model.weight.grad is not None
        return {**held, "gradient": model.weight.grad.tolist(), "ranks": lite.world_size}

    lite = Lite(accelerator="cpu", devices=2, strategy="ddp", launcher=Ray(cpus_per_rank=0.5))
    assert lite.launch(train) == {"here": 3, "gradient": [[0.5, 0.5]], "ranks": 2}


def test_places_follow_the_nodes_of_the_actors() -> None:
    """Ray places actors in any order: local ranks count per node, nodes in the order of their first rank."""
    found = [(w.global_rank, w.node_rank, w.local_rank, w.local_world_size) for w in worlds(["b", "a", "b"])]
    assert found == [(0, 0, 0, 2), (1, 1, 0, 1), (2, 0, 1, 2)]


def test_a_script_is_refused() -> None:
    """The error says what to call."""
    with pytest.raises(UsageError, match=r"launcher='ray' runs functions: call lite.launch\(fn\)"):
        Ray().launcher_launch(job=Job(num_processes=2, command=("train.py",)))
