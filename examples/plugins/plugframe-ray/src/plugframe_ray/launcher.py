"""The launcher: one actor per rank, which becomes that rank."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections import Counter
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError

from plugframe.base import Launcher
from plugframe.errors import RankFailedError, UnsupportedError, UsageError
from plugframe.hooks import Job, World, hookimpl
from plugframe.launch import Rendezvous, run_as_rank
from plugframe.utils.environment import preserved_environment

#: Time for the processes of killed actors to end.
END_TIMEOUT_S = 20.0


class Worker:
    """The process of a rank."""

    def place(self) -> tuple[str, str, int, int]:
        """Return this worker's node, its address there, a free port, and its process id."""
        address = str(ray.util.get_node_ip_address())
        with socket.socket() as free:
            free.bind((address, 0))
            return ray.get_runtime_context().get_node_id(), address, int(free.getsockname()[1]), os.getpid()

    def run(
        self, job: Job, function: Any, world: World, rendezvous: Rendezvous, environ: dict[str, str]
    ) -> tuple[Any, str, int]:
        """Become a rank; return the function's result, or the traceback of its error and the exit code."""
        # Variables of the launching process, but not those that differ by node or that Ray has set, such as devices.
        lacking = {name: value for name, value in environ.items() if name not in os.environ}
        try:
            here = replace(job, function=function, environ={**lacking, **job.environ})
            return run_as_rank(here, world, rendezvous), "", 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
            return None, f"it left with exit code {code}" if code else "", code
        except BaseException:  # noqa: BLE001 what a user's exception refers to may not be picklable
            return None, traceback.format_exc(), 1


class Ray(Launcher):
    """Run a function with each rank in an actor of Ray; an error of one ends all of them.

    Args:
        address: of the cluster, or ``"auto"``; by default the cluster this process is connected to, or a new one on
            this machine, which ends with the job.
        cpus_per_rank: CPUs to reserve for each rank.
        gpus_per_rank: GPUs to reserve for each rank.
    """

    def __init__(self, *, address: str | None = None, cpus_per_rank: float = 1.0, gpus_per_rank: float = 0.0) -> None:
        self.address, self.cpus_per_rank, self.gpus_per_rank = address, cpus_per_rank, gpus_per_rank

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        if job.function is None:
            raise UsageError("launcher='ray' runs functions: call lite.launch(fn), or use launcher='spawn'.")
        for name in ("log_dir", "tee", "numa_binding", "debug_rank"):
            if getattr(job, name) is not None:
                raise UnsupportedError(f"launcher='ray' does not support {name}: leave it out; Ray keeps the output.")
        own = not ray.is_initialized()
        with preserved_environment():  # Ray sets variables of its own
            return self._launch(job, own)

    def _launch(self, job: Job, own: bool) -> Any:
        if own:
            num_cpus = None if self.address else max(1, round(job.num_processes * job.num_nodes * self.cpus_per_rank))
            ray.init(address=self.address, num_cpus=num_cpus, include_dashboard=False, log_to_driver=True)
        actor = ray.remote(num_cpus=self.cpus_per_rank, num_gpus=self.gpus_per_rank)(Worker)
        workers = [actor.remote() for _ in range(job.num_processes * job.num_nodes)]
        places: list[tuple[str, str, int, int]] = []
        try:
            places += ray.get([worker.place.remote() for worker in workers], timeout=job.timeout_s)
            return self._run(job, workers, places)
        finally:
            for worker in workers:
                ray.kill(worker)
            here = ray.get_runtime_context().get_node_id()
            wait_for_end([pid for node, _, _, pid in places if node == here])
            if own:
                ray.shutdown()

    def _run(self, job: Job, workers: list[Any], places: list[tuple[str, str, int, int]]) -> Any:
        rendezvous = Rendezvous(address=places[0][1], port=places[0][2])
        # Sent by value, once; the job without it is plain data.
        function, plain = ray.put(job.function), replace(job, function=None)
        running = {
            worker.run.remote(plain, function, world, rendezvous, dict(os.environ)): world.global_rank
            for worker, world in zip(workers, worlds([node for node, *_ in places]), strict=True)
        }
        results: dict[int, Any] = {}
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            rank = running.pop(done)
            try:
                results[rank], error, code = ray.get(done)
            except RayActorError as died:
                error, code = str(died), 1
            if error:
                raise RankFailedError(f"rank {rank} failed in its Ray actor\n{error}", exit_code=code)
        return results[0]


def wait_for_end(pids: list[int]) -> None:
    """Wait for processes of this machine, which Ray ends in the background."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)


def worlds(nodes: list[str]) -> list[World]:
    """Return the place of each rank, from the node of each."""
    sizes, seen = Counter(nodes), Counter[str]()
    order = list(sizes)
    found = []
    for rank, node in enumerate(nodes):
        found.append(
            World(
                global_rank=rank,
                local_rank=seen[node],
                node_rank=order.index(node),
                world_size=len(nodes),
                local_world_size=sizes[node],
                num_nodes=len(order),
            )
        )
        seen[node] += 1
    return found
