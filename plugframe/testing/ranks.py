"""Run tests on real ranks: processes with a torchrun-like rendezvous, cleaned up afterwards.

::

    def add_up(world):                                   # at module level: the ranks import it by name
        tensor = torch.tensor(world.global_rank)
        ...
        return tensor.item()

    def test_sums():
        assert run_ranks(2, add_up) == [1, 1]

Each rank has the environment variables that torchrun sets, and a store on loopback behind them
(``dist.init_process_group("gloo")`` works as it is; `rank_store` gives the store). `run_checks` runs many
small functions in one start, since starting is what costs. The first start of a test session imports torch
in a fork server (some seconds); later ones fork from it in no time.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import connection, get_context
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from plugframe.hooks.variables import RANK
from plugframe.hooks.world import World
from plugframe.utils.environment import environment

#: Time for the other ranks to end by themselves after a failure.
GRACE_S = 5.0
#: Modules that the fork server imports before the first rank, by name; add those that your ranks spend time on.
PRELOADED = ["plugframe.testing.preload", "pytest"]


class RanksFailed(AssertionError):
    """Some ranks raised, died or did not end; the message holds their tracebacks."""


def run_ranks(
    num_ranks: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout_s: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call ``fn(world, *args)`` in `num_ranks` processes of one job and return the results in rank order.

    Args:
        fn: a function at the top level of a module; `args` and what it returns are pickled.
        timeout_s: after that a rank prints where each of its threads is, and ends.
        env: environment variables of the ranks, on top of this process's.

    Raises:
        RanksFailed: with the traceback and the last output of every rank that failed.
    """
    processes = get_context("forkserver")
    # The fork server starts, and imports torch, with one thread.
    with _store() as port, _output() as folder, environment({"OMP_NUM_THREADS": "1"}):
        _keep_helpers_files_apart()
        processes.set_forkserver_preload(PRELOADED)
        call = pickle.dumps((fn, args))
        inherited = {name: value for name, value in os.environ.items() if name != RANK}
        ranks: list[tuple[Any, Any]] = []
        outcomes: list[tuple[bool, Any] | None] = []
        try:
            for rank in range(num_ranks):
                here, there = processes.Pipe(duplex=False)
                variables = {**inherited, **_variables(rank, num_ranks, port), **(env or {})}
                task = (call, variables, os.getcwd(), str(folder / f"{rank}"), timeout_s, there)
                # Not a daemon: a rank may have processes of its own, such as a loader's workers.
                process = processes.Process(target=_rank_main, args=task, name=f"rank {rank}", daemon=False)
                process.start()
                there.close()
                ranks.append((process, here))
            outcomes = _collect([here for _, here in ranks], timeout_s + GRACE_S)
        finally:
            patient = len(outcomes) == len(ranks) and all(outcome and outcome[0] for outcome in outcomes)
            exits = [_end(process, patience_s=30.0 if patient else 0.5) for process, _ in ranks]
            for _, here in ranks:
                here.close()
        return _results(outcomes, exits, [_tail(folder / f"{rank}") for rank in range(num_ranks)])


def run_checks(
    num_ranks: int,
    make: Callable[[World], AbstractContextManager[Any]],
    checks: Sequence[Callable[[Any], None]],
    *,
    timeout_s: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Run every ``check(made)`` on every rank of one job; return what failed, by the check's name.

    `make` (a context manager over the rank's `World`) builds what all checks get. A check that passed on all
    ranks has an empty string. After a failure the ranks may be out of step, so the later checks do not run.
    """
    try:
        reports = run_ranks(num_ranks, _run_checks, make, list(checks), timeout_s, timeout_s=timeout_s, env=env)
    except RanksFailed as error:
        return {check.__name__: str(error) for check in checks}
    result = {}
    for check in checks:
        name = check.__name__
        texts = [f"rank {rank}: {report[name]}" for rank, report in enumerate(reports) if report[name]]
        result[name] = "\n".join(texts)
    return result


def rank_store(timeout_s: float = 30.0) -> Any:
    """Return the store of this job. Call it in a rank."""
    timeout = _timedelta(timeout_s)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(  # type: ignore[attr-defined]
        address, port, int(os.environ["WORLD_SIZE"]), False, timeout
    )


def _timedelta(seconds: float) -> Any:
    from datetime import timedelta

    return timedelta(seconds=seconds)


@contextmanager
def _store() -> Iterator[int]:
    """Serve a store on a free loopback port, as torchrun's agent does, and yield the port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    port = listener.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, None, True, master_listen_fd=listener.detach(), wait_for_workers=False
    )
    try:
        yield port
    finally:
        del store


@contextmanager
def _output() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        yield Path(folder)


def _keep_helpers_files_apart() -> None:
    """Put the fork server's socket into the system's temporary folder: it outlives the test's own."""
    before = tempfile.tempdir
    with environment({"TMPDIR": None}):
        tempfile.tempdir = None
        try:
            get_temp_dir()
        finally:
            tempfile.tempdir = before


def _variables(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "ROLE_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": num_ranks,
        "LOCAL_WORLD_SIZE": num_ranks,
        "ROLE_WORLD_SIZE": num_ranks,
        "GROUP_WORLD_SIZE": 1,
        "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "OMP_NUM_THREADS": 1,
    }
    return {name: str(value) for name, value in values.items()}


def _rank_main(call: bytes, variables: dict[str, str], cwd: str, output: str, timeout_s: float, results: Any) -> None:
    with open(output, "w", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    # A rank ends by itself, even if the process that started it has died.
    faulthandler.dump_traceback_later(timeout_s, exit=True, file=sys.stderr)
    # A rank that hangs and is stopped after a failure prints its stack.
    faulthandler.register(signal.SIGTERM, file=sys.stderr, chain=True)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    torch.set_num_threads(1)
    # As in a job: a loader, for example, starts its workers without a fork server.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0", RuntimeWarning)  # torch's compiler
    rank, size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    world = World(global_rank=rank, local_rank=rank, world_size=size, local_world_size=size)
    try:
        fn, args = pickle.loads(call)
        outcome = pickle.dumps((True, fn(world, *args)))
    except BaseException:  # noqa: BLE001 - reported to the test
        outcome = pickle.dumps((False, traceback.format_exc()))
    results.send_bytes(outcome)
    results.close()


def _collect(pipes: Sequence[Any], timeout_s: float) -> list[tuple[bool, Any] | None]:
    """Read each rank's outcome; None for a rank that died, or is too late after the first failure."""
    outcomes: list[tuple[bool, Any] | None] = [None] * len(pipes)
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout_s
    while waiting and (left_s := deadline - time.monotonic()) > 0:
        ready: list[Any] = connection.wait(list(waiting), left_s)
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                data = pipe.recv_bytes()
                outcomes[rank] = pickle.loads(data)
            except EOFError:
                outcomes[rank] = None
            outcome = outcomes[rank]
            if outcome is None or not outcome[0]:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return outcomes


def _end(process: Any, *, patience_s: float) -> int:
    """Wait for the process to end, stop it if it does not, and return its exit code."""
    process.join(patience_s)
    for stop in (process.terminate, process.kill):
        if process.is_alive():
            stop()
            process.join(GRACE_S)
    code: int = process.exitcode
    process.close()
    return code


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    return "\n".join(path.read_text(errors="replace").splitlines()[-40:])


def _results(outcomes: list[tuple[bool, Any] | None], exits: list[int], outputs: list[str]) -> list[Any]:
    failed = any(outcome is None or not outcome[0] for outcome in outcomes)
    texts = []
    for rank, (outcome, code, output) in enumerate(zip(outcomes, exits, outputs, strict=True)):
        # After a failure the others are stopped: their exit codes mean nothing.
        if outcome is not None and outcome[0] and (failed or code == 0):
            if failed and output:
                texts.append(f"rank {rank} gave its result; its last output:\n{output}\n")
            continue
        if outcome is None or outcome[0]:
            what = f"{'gave no result' if outcome is None else 'gave its result'}, then exit code {code}\n"
        else:
            what = f"raised\n{outcome[1]}"
        said = f"--- last output of rank {rank} ---\n{output}\n" if output else ""
        texts.append(f"rank {rank} {what}{said}")
    if texts:  # errors first: the other ranks were stopped, or lost their peer
        raise RanksFailed("\n".join(sorted(texts, key=lambda text: " raised\n" not in text)))
    return [outcome[1] for outcome in outcomes if outcome is not None]


def _run_checks(
    world: World, make: Callable[[World], Any], checks: list[Callable[[Any], None]], timeout_s: float
) -> dict[str, str]:
    report: dict[str, str] = {}
    # Longer than the timeout of the job, so that the rank that hangs is reported, and not those that wait for it.
    store = dist.PrefixStore("run_checks", rank_store(timeout_s=10 * timeout_s))  # type: ignore[attr-defined]
    failed = ""
    with make(world) as made:
        for check in checks:
            name = check.__name__
            if failed:
                report[name] = f"not run: {failed} failed before"
                continue
            try:
                check(made)
                report[name] = ""
            except BaseException:  # noqa: BLE001 - reported under the check's name
                report[name] = traceback.format_exc()
                print(report[name], file=sys.stderr)  # visible even if another rank hangs because of it
            # All ranks stop at the first failure of any: the next collective would pair with another check's.
            store.set(f"{name}/{world.global_rank}", report[name] or "passed")
            if any(store.get(f"{name}/{rank}") != b"passed" for rank in range(world.world_size)):
                failed = name
    return report
