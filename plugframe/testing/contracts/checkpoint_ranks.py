"""Checkpoint contract checks on ranks: faults and crashes on one, consistency between two."""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plugframe.checkpoint import fill, materialize
from plugframe.errors import CheckpointError
from plugframe.hooks.world import World
from plugframe.testing.contracts import states
from plugframe.testing.contracts.running import chosen, one_line, running
from plugframe.testing.ranks import rank_store

ATOMIC = "Atomic (a save that fails or dies leaves the earlier checkpoint complete)"
ALIKE = "Alike (a save or a load returns or raises consistently on all ranks)"
PATHS = "Paths (a str or a Path; a file that is not a checkpoint is refused, and not changed)"
SHARDED = "Any number of ranks (a checkpoint loads on any number of ranks)"

#: Audit events before file system calls, at which a process may die.
_CALLS = ("open", "ctypes.call_function", "shutil.")
_LIMIT_BYTES = 256 * 1024
_MOST_DEATHS = 24
_DIED = 77
_KEY = "plugframe.testing"


def check_alone(
    world: World, spec: str, options: dict[str, Any], settings: dict[str, Any], path: str, sharded: bool
) -> dict[str, str]:
    """Run the checks that need their own process. Called in a rank."""
    if "://" in path:
        return {"died": "", ATOMIC: ""}

    def job() -> Any:
        return running(checkpoint=chosen("checkpoint", spec, options), **settings)

    # First, while this process has no threads, which its forks would lack.
    died = _dying(job, path)
    return {"died": died, ATOMIC: _full_disk(job, path)}


def _full_disk(job: Callable[[], Any], path: str) -> str:
    """Save more than the file system has space for; describe what is wrong with the outcome."""
    large = {"large": torch.arange(4 * _LIMIT_BYTES, dtype=torch.float32), "epoch": 2}
    with job() as (_, context):
        hooks = context.hooks
        hooks.checkpoint_save(path=path, state=states.small(1), info={}, wait=True)
        before = sorted(os.listdir(os.path.dirname(path)))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT_BYTES, hard))
        error = None
        try:
            hooks.checkpoint_save(path=path, state=large, info={}, wait=True)
        except Exception as raised:  # noqa: BLE001 - reported as it is
            error = raised
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        expected = large if error is None else states.small(1)
        problem = _found(hooks, path, [expected])
        if error is None:
            return problem and f"a save for which there was no space raised nothing, but {problem}"
        if problem:
            return f"after a save that failed with {one_line(error)}, {problem}"
        if not isinstance(error, CheckpointError) or os.path.basename(path) not in str(error):
            return f"a save for which there was no space raised {one_line(error)}, not a CheckpointError with the path"
        after = sorted(os.listdir(os.path.dirname(path)))
        return "" if after == before else f"a save that failed left {', '.join(sorted(set(after) - set(before)))}"


def _found(hooks: Any, path: str, allowed: list[Any]) -> str:
    """Describe the checkpoint at `path` if its state is none of `allowed`."""
    try:
        state = hooks.checkpoint_load(path=path, trusted=False, lazy=False)
    except Exception as error:  # noqa: BLE001 - reported as it is
        return f"loading raised {one_line(error)}"
    differences = [states.difference(each, state) for each in allowed]
    return "" if "" in differences else f"what lies there is another state: {differences[0]}"


def _dying(job: Callable[[], Any], path: str) -> str:
    """Let processes die during saves; describe an incomplete checkpoint that one of them left."""
    folder = os.path.dirname(os.path.dirname(path))
    first = _in_copy(lambda: _save_and_die(job, path, 0, folder, at=None))
    if "calls" not in first:
        return str(first.get("error", "a save in a copy of this process ended it"))
    for module in first["modules"]:  # once, and not in every copy
        with suppress(ImportError):
            importlib.import_module(module)
    # The first save replaced nothing; replacing an earlier checkpoint may take more calls.
    calls = int(_in_copy(lambda: _save_and_die(job, path, 1, folder, at=None)).get("calls", first["calls"]))
    step = max(1, -(-calls // _MOST_DEATHS))
    for number, at in enumerate(range(1, calls + 1, step), 2):
        _in_copy(lambda at=at, number=number: _save_and_die(job, path, number, folder, at=at))  # type: ignore[misc]
        allowed = list(range(number + 1))
        problem = _in_copy(lambda allowed=allowed: _look(job, path, allowed)).get("error", "")  # type: ignore[misc]
        if problem:
            return f"a process died before call {at} of the {calls} that a save makes to the file system, and {problem}"
    last = _in_copy(lambda: _save_and_die(job, path, 0, folder, at=None))
    if "error" in last:
        return f"after processes had died while saving, the next save failed: {last['error']}"
    beside = sorted(set(os.listdir(os.path.dirname(path))) - {os.path.basename(path)})
    return f"files of dead processes remain after the next save: {', '.join(beside)}" if beside else ""


def _in_copy(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run `act` in a fork of this process and return its result; empty if it died."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads that the fork would lack: there are none
        copy = os.fork()
    if copy == 0:
        try:
            told = act()
        except BaseException as error:  # noqa: BLE001 - reported as it is
            told = {"error": one_line(error)}
        os.write(writing, json.dumps(told).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        text = file.read()
    os.waitpid(copy, 0)
    told = json.loads(text) if text else {}
    return dict(told)


def _save_and_die(job: Callable[[], Any], path: str, number: int, folder: str, *, at: int | None) -> dict[str, Any]:
    """Save state `number`, and die before file system call `at`; return the number of calls."""
    armed, calls, before = False, 0, set(sys.modules)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        if not armed or not (event.startswith(_CALLS) or event.startswith("os.")):
            return
        if event == "open" and not (
            isinstance(arguments[0], (str, bytes)) and os.fsdecode(arguments[0]).startswith(folder)
        ):
            return
        calls += 1
        if calls == at:
            os._exit(_DIED)

    with job() as (_, context):
        sys.addaudithook(hook)
        armed = True
        context.hooks.checkpoint_save(path=path, state=states.small(number), info={}, wait=True)
        armed = False
    return {"calls": calls, "modules": [name for name in sys.modules if name not in before]}


def _look(job: Callable[[], Any], path: str, allowed: list[int]) -> dict[str, Any]:
    with job() as (_, context):
        problem = _found(context.hooks, path, [states.small(number) for number in reversed(allowed)])
    return {"error": problem} if problem else {}


# ---------------------------------------------------------------------- two ranks


class _Pair:
    """One of two ranks, with a store for their results."""

    def __init__(self, world: World, hooks: Any) -> None:
        self.rank, self.other = world.global_rank, 1 - world.global_rank
        self.hooks = hooks
        self.store = rank_store(timeout_s=30.0)
        self.round = 0

    def outcomes(self, what: str, call: Callable[..., Any], **arguments: Any) -> tuple[str, str]:
        """Run `call` on both ranks and return the outcomes on rank 0 and on rank 1.

        The outcomes go through a store and not a collective, which a rank that hangs would not reach.
        """
        try:
            result = call(**arguments)
            if hasattr(result, "wait"):
                result.wait()
            mine = "returned"
        except Exception as error:  # noqa: BLE001 - reported as it is
            mine = one_line(error)
        self.round += 1
        patience_s = 30 if self.round == 1 else 8  # the first call imports what it needs
        self.store.set(f"{_KEY}/{self.round}/{self.rank}", mine)
        try:
            self.store.wait([f"{_KEY}/{self.round}/{self.other}"], timedelta(seconds=patience_s))
        except dist.DistError:
            raise _Hangs(f"{what} {mine} on rank {self.rank}, while rank {self.other} waits") from None
        theirs = self.store.get(f"{_KEY}/{self.round}/{self.other}").decode()
        return (mine, theirs) if self.rank == 0 else (theirs, mine)


class _Hangs(AssertionError):
    """A rank did not return from a call."""


def check_pair(
    world: World, spec: str, options: dict[str, Any], settings: dict[str, Any], path: str, sharded: bool
) -> dict[str, str]:
    """Run the checks of two ranks. Called on both."""
    found = {ALIKE: "", PATHS: "", SHARDED: ""}
    chosen_plugin = chosen("checkpoint", spec, options)
    with running(alone=False, devices=2, checkpoint=chosen_plugin, **settings) as (lite, context):
        pair = _Pair(world, context.hooks)
        try:
            found[ALIKE] = _alike(pair, path, sharded)
            if not found[ALIKE]:
                found[PATHS] = _paths(lite, path)
                found[SHARDED] = _any_number(pair, lambda: running(checkpoint=chosen_plugin, **settings), path, sharded)
        except _Hangs as error:
            # The other rank may hang: this one ends both.
            sys.stderr.write(f"{ALIKE}: {error}\n")
            sys.stderr.flush()
            os._exit(1)
    return found


def _alike(pair: _Pair, path: str, sharded: bool) -> str:
    save, load = pair.hooks.checkpoint_save, pair.hooks.checkpoint_load
    good = pair.outcomes("a save", save, path=path, state=states.small(1), info={}, wait=True)
    if good != ("returned", "returned"):
        return f"a save of a good state: {_both(good)}"
    for culprit in (0, 1) if sharded else (0,):
        state = {**states.small(2), "culprit": object() if pair.rank == culprit else 1}
        bad = pair.outcomes("a save", save, path=path, state=state, info={}, wait=True)
        if any(not text.startswith("Checkpoint") for text in bad):
            return f"a save of what cannot be saved on rank {culprit}: {_both(bad)}; both must raise a CheckpointError"
    nothing = pair.outcomes("a load", load, path=f"{path}-nothing", trusted=False, lazy=False)
    if any(not text.startswith("Checkpoint") for text in nothing):
        return f"a load of a missing checkpoint: {_both(nothing)}; both must raise a CheckpointError"
    problem = _found(pair.hooks, path, [states.small(1)])
    return problem and f"after saves that failed on one rank, {problem}"


def _both(outcomes: tuple[str, str]) -> str:
    return f"rank 0 {outcomes[0]!r}, rank 1 {outcomes[1]!r}"


def _paths(lite: Any, path: str) -> str:
    for kind in (str, Path) if "://" not in path else (str,):
        place = kind(path)
        state = {"w": torch.arange(3.0), "epoch": 7}
        try:
            lite.save(place, state)
            loaded = lite.load(place)
        except Exception as error:  # noqa: BLE001 - reported as it is
            return f"lite.save and lite.load with a {kind.__name__} raised {one_line(error)}"
        differs = states.difference(state, {key: loaded[key] for key in state if key in loaded})
        if differs:
            return f"saved and loaded with a {kind.__name__}: {differs}"
    return ""


def _any_number(pair: _Pair, alone: Callable[[], Any], path: str, sharded: bool) -> str:
    """Save on two ranks and load on one and on two, and vice versa."""
    wholes = {"even": torch.arange(24.0).reshape(8, 3), "uneven": torch.arange(21.0).reshape(7, 3), "epoch": 5}
    spread: dict[str, Any] = {name: _spread(value) for name, value in wholes.items()} if sharded else wholes
    both = pair.outcomes("a save", pair.hooks.checkpoint_save, path=path, state=spread, info={}, wait=True)
    if both != ("returned", "returned"):
        return f"a save of sharded tensors: {_both(both)}"
    problem = _reads(pair.hooks, path, wholes, sharded, "two ranks saved, two loaded")
    single = f"{path}-single"
    if not problem and pair.rank == 0:
        try:
            with alone() as (_, context):
                problem = _reads(context.hooks, path, wholes, False, "two ranks saved, one loaded")
                context.hooks.checkpoint_save(path=single, state=wholes, info={}, wait=True)
        except Exception as error:  # noqa: BLE001 - reported as it is
            problem = f"two ranks saved, one loaded: {one_line(error)}"
    problem = pair.hooks.collective_broadcast_object(obj=problem, src=0, group=None)
    return problem or _reads(pair.hooks, single, wholes, sharded, "one rank saved, two loaded")


def _reads(hooks: Any, path: str, wholes: dict[str, Any], sharded: bool, what: str) -> str:
    """Load in full, and in shards where the plugin supports them; describe values that differ."""
    for lazy in (False, True):
        try:
            loaded = hooks.checkpoint_load(path=path, trusted=False, lazy=lazy)
        except Exception as error:  # noqa: BLE001 - reported as it is
            return f"{what}: {one_line(error)}"
        if lazy and sharded:
            targets = {name: torch.zeros_like(value) for name, value in wholes.items() if isinstance(value, Tensor)}
            parts = {name: _spread(value) for name, value in targets.items()}
            fill([(parts[name], loaded[name]) for name in parts])
            loaded = {**loaded, **{name: part.full_tensor() for name, part in parts.items()}}
        differs = states.difference(wholes, materialize(loaded))
        if differs:
            return f"{what}: {differs}"
    return ""


def _spread(value: Any) -> Any:
    """Return this rank's shard of a tensor, by rows."""
    if not isinstance(value, Tensor):
        return value
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(value, init_device_mesh("cpu", (2,)), [Shard(0)], src_data_rank=None)
