"""The environment contract suite: each rank's correct position, or a one-line error."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from plugframe.errors import EnvironmentMismatchError, UsageError
from plugframe.hooks.world import World
from plugframe.lite import Lite
from plugframe.testing.contracts.base import PluginContract
from plugframe.testing.contracts.running import broken, cpu_accelerator, one_line
from plugframe.testing.ranks import RanksFailed, run_ranks
from plugframe.utils.environment import preserved_environment

DETECTED = "Detected (if, and only if, its variables are set)"
WORLD = "World (ranks and sizes are those of the job, and fit together on every rank)"
TOLD = "Told (a missing or invalid variable is a one-line error that names it)"
VALIDATED = "Validated (the requested ranks and nodes must be those that were started)"
CHOSEN = "Chosen ('auto' selects it for a process that it describes)"
MET = "Met (the ranks get one store, new for each connection, on loopback if there is one node)"
REQUEUED = "Requeued (without a job no requeue is requested, and the result is False)"
CLEAN = "Law 9 (nothing is left behind)"

#: Variables that a process needs to run; a simulated job has only these and its own.
_KEPT = ("PATH", "HOME", "USER", "TMPDIR", "TEMP", "LANG", "LC_ALL", "SHELL", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
_KEPT_PREFIXES = ("PYTHON", "PYTEST", "COVERAGE", "DYLD_", "OMP_", "CONDA", "XDG_")


class EnvironmentContract(PluginContract):
    """Subclass it, set `spec` and define `variables`, which simulates jobs.

    ::

        class TestAcme(EnvironmentContract):
            spec = "acme"

            def variables(self, *, num_nodes, ranks_per_node, rank, port):
                return {"ACME_RANK": str(rank), "ACME_SIZE": str(num_nodes * ranks_per_node), …}

    Attributes:
        shapes: the jobs to simulate, as (nodes, ranks on each); what the scheduler cannot start is left out.
        optional: variables of `variables` that may be missing or wrong without an error.
    """

    kind = "environment"
    shapes: ClassVar[tuple[tuple[int, int], ...]] = ((1, 1), (1, 2), (2, 1), (2, 3))
    optional: ClassVar[tuple[str, ...]] = ()

    def variables(self, *, num_nodes: int, ranks_per_node: int, rank: int, port: int) -> Mapping[str, str]:
        """Return what the scheduler sets for one rank of a job; an empty mapping if it starts no processes.

        Args:
            num_nodes: nodes of the job.
            ranks_per_node: ranks on each.
            rank: of the process, from 0; ranks are numbered node after node.
            port: a free one, for a scheduler that hands one out.
        """
        raise NotImplementedError(f"{type(self).__name__} must give variables(): what the scheduler sets for a rank.")

    # ------------------------------------------------------------------ simulation

    @contextmanager
    def within(self, given: Mapping[str, str]) -> Iterator[Any]:
        """Yield the plugin in a process with these variables and no other scheduler's; check that it sets none."""
        kept = {k: v for k, v in os.environ.items() if k in _KEPT or k.startswith(_KEPT_PREFIXES)}
        with preserved_environment():
            os.environ.clear()
            os.environ.update({**kept, **given})
            yield self.make()
            now = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
            expected = {k: v for k, v in {**kept, **given}.items() if not k.startswith("PYTEST")}
            changed = sorted(k for k in {**now, **expected} if now.get(k) != expected.get(k))
            if changed:
                broken(CLEAN, f"asking it about the job changed the variables {', '.join(changed)}")

    def jobs(self) -> Iterator[tuple[int, int, int, Mapping[str, str]]]:
        """Yield nodes, ranks on each, rank and variables of every rank of every shape; skip if it starts nothing."""
        given = [
            (nodes, each, rank, self.variables(num_nodes=nodes, ranks_per_node=each, rank=rank, port=29_500))
            for nodes, each in self.shapes
            for rank in range(nodes * each)
        ]
        if not any(variables for *_, variables in given):
            pytest.skip("It describes a process that no scheduler started.")
        yield from given

    def largest(self) -> tuple[int, int, int, Mapping[str, str]]:
        """Return the last rank of the largest job."""
        return max(self.jobs(), key=lambda job: (job[0] * job[1], job[2]))

    # ------------------------------------------------------------------ detection

    def test_it_is_detected_by_its_variables_alone(self) -> None:
        """Without variables it is not detected, unless it describes a process that no scheduler started."""
        with self.within({}) as plugin:
            detected, launched = plugin.environment_detect(), plugin.environment_launched()
            if not (isinstance(detected, bool) and isinstance(launched, bool)):
                broken(DETECTED, f"the answers must be True or False, got {detected!r} and {launched!r}")
            if detected and launched:
                broken(DETECTED, "with none of its variables set it claims to have started this process")

    def test_it_is_detected_in_every_rank_of_its_jobs(self) -> None:
        """In a job it is detected as launched; its descriptor lists only variables that are set there."""
        for nodes, each, rank, variables in self.jobs():
            at = f"on rank {rank} of {nodes} nodes with {each} ranks each"
            absent = [name for name in self.descriptor.variables if name not in variables]
            if absent:
                broken(DETECTED, f"its descriptor asks for {', '.join(absent)}, which are not set {at}")
            with self.within(variables) as plugin:
                if plugin.environment_detect() is not True:
                    broken(DETECTED, f"environment_detect() is not True {at}")
                if plugin.environment_launched() is not True:
                    broken(DETECTED, f"environment_launched() is not True {at}")

    def test_auto_chooses_it(self) -> None:
        """Where its variables are set, "auto" selects it."""
        if self.descriptor.priority is None:
            pytest.skip("Its priority is None: it is never chosen under 'auto'.")
        for nodes, each, rank, variables in self.jobs():
            with self.within(variables):
                try:
                    lite = Lite(accelerator=cpu_accelerator(), devices=each, num_nodes=nodes)
                except UsageError as error:
                    broken(CHOSEN, f"on rank {rank} of {nodes} nodes with {each} ranks each: {one_line(error)}")
                name, world = lite.plan.choices["environment"].name, lite.plan.world
                lite.teardown()
            if name != self.spec.rpartition(":")[2]:
                broken(CHOSEN, f"{name!r} was chosen on rank {rank} of {nodes} nodes with {each}: raise its priority")
            if world is None or world.global_rank != rank:
                broken(CHOSEN, f"rank {rank} of {nodes} nodes with {each} ranks each took its place for {world}")

    # ------------------------------------------------------------------ the world

    def test_every_rank_knows_its_place(self) -> None:
        """Ranks and sizes are those of the job, and local ranks are unique on a node."""
        places: dict[tuple[int, int], set[tuple[int, int]]] = {}
        for nodes, each, rank, variables in self.jobs():
            at = f"on rank {rank} of {nodes} nodes with {each} ranks each"
            with self.within(variables) as plugin:
                try:
                    world, again = plugin.environment_world(), plugin.environment_world()
                except Exception as error:  # noqa: BLE001 - reported as it is
                    broken(WORLD, f"{at} environment_world() raised {one_line(error)}")
            if not isinstance(world, World) or world != again:
                broken(WORLD, f"{at} environment_world() gave {world!r}, then {again!r}")
            expected = {"global_rank": rank, "world_size": nodes * each, "local_world_size": each, "num_nodes": nodes}
            wrong = [f"{k}={getattr(world, k)} for {v}" for k, v in expected.items() if getattr(world, k) != v]
            if wrong:
                broken(WORLD, f"{at} it has {', '.join(wrong)}")
            problem = _misfit(world)
            if problem:
                broken(WORLD, f"{at} {problem}")
            taken = places.setdefault((nodes, each), set())
            if (world.node_rank, world.local_rank) in taken:
                broken(WORLD, f"{at} node_rank={world.node_rank} and local_rank={world.local_rank} are another's too")
            taken.add((world.node_rank, world.local_rank))

    def test_without_a_job_there_is_one_process(self) -> None:
        """An environment that started nothing describes one process."""
        with self.within({}) as plugin:
            if plugin.environment_launched():
                pytest.skip("It describes processes that exist.")
            if plugin.environment_world() != World():
                broken(WORLD, f"it started nothing, and describes {plugin.environment_world()}")

    # ------------------------------------------------------------------ variables that are missing or wrong

    def test_a_missing_variable_is_told(self) -> None:
        """A missing variable is not needed, prevents detection, or is a one-line error that names it."""
        nodes, each, rank, variables = self.largest()
        for name in variables:
            self._changed(name, "not set", {k: v for k, v in variables.items() if k != name}, nodes, each, rank)

    @pytest.mark.parametrize("value", ["", "two", "-1", "999999999", "1.5"])
    def test_a_wrong_variable_is_told(self, value: str) -> None:
        """An invalid number is an error that names variable and value, or has no effect."""
        nodes, each, rank, variables = self.largest()
        for name, right in variables.items():
            if right.lstrip("-").isdigit():
                self._changed(name, f"{name}={value!r}", {**variables, name: value}, nodes, each, rank)

    def _changed(self, name: str, what: str, given: Mapping[str, str], nodes: int, each: int, rank: int) -> None:
        what = f"{name} {what}" if what == "not set" else what
        with self.within(given) as plugin:
            try:
                if not all(v in given for v in self.descriptor.variables) or not plugin.environment_detect():
                    return
                world = plugin.environment_world()
            except EnvironmentMismatchError as error:
                if name not in str(error):
                    broken(TOLD, f"with {what} the error does not name the variable: {error}")
                if "\n" in str(error).strip():
                    broken(TOLD, f"with {what} the error has {len(str(error).splitlines())} lines: {error}")
                return
            except Exception as error:  # noqa: BLE001 - reported as it is
                broken(TOLD, f"with {what} it raised {one_line(error)}, not an EnvironmentMismatchError")
        place = (world.global_rank, world.world_size, world.local_world_size, world.num_nodes)
        other = place != (rank, nodes * each, each, nodes)
        # A wrong number that is consistent with the others cannot be detected.
        if other and given.get(name, "").isdigit():
            other = bool(_misfit(world))
        if other and name not in self.optional:
            problem = _misfit(world) or f"it takes rank {rank} of {nodes} nodes with {each} ranks each for {world}"
            broken(TOLD, f"with {what} nothing is raised, and {problem}")

    def test_what_was_asked_for_must_be_what_was_started(self) -> None:
        """The job's own numbers, or none, are accepted; others are an error with both numbers."""
        for nodes, each, _, variables in self.jobs():
            with self.within(variables) as plugin:
                for asked in ((each, nodes), (None, None), (each, None), (None, nodes)):
                    try:
                        plugin.environment_validate(num_processes=asked[0], num_nodes=asked[1])
                    except UsageError as error:
                        broken(VALIDATED, f"{nodes} nodes with {each} ranks each, asked for {asked}: {error}")
                for asked in ((each + 40, None), (None, nodes + 40)):
                    self._refuses(plugin, asked, each if asked[0] else nodes)

    def _refuses(self, plugin: Any, asked: tuple[int | None, int | None], have: int) -> None:
        what = f"{asked[0]} processes on each node" if asked[0] else f"{asked[1]} nodes"
        try:
            plugin.environment_validate(num_processes=asked[0], num_nodes=asked[1])
        except EnvironmentMismatchError as error:
            want = str(asked[0] or asked[1])
            if want not in str(error) or str(have) not in str(error) or "\n" in str(error).strip():
                broken(VALIDATED, f"{what} were requested, {have} started; the message must name both: {error}")
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(VALIDATED, f"{what} were asked for, {have} started; it raised {one_line(error)}")
        else:
            broken(VALIDATED, f"{what} were requested, {have} started, and nothing is raised")

    def test_without_a_job_nothing_is_requeued(self) -> None:
        """No requeue is requested from a scheduler that did not start this process."""
        with self.within({"PATH": ""}) as plugin:
            try:
                answer = plugin.environment_requeue()
            except UsageError:
                return  # it is asked only where it was detected
            if answer is not False:
                broken(REQUEUED, f"environment_requeue() answered {answer!r}, with no job there")

    # ------------------------------------------------------------------ the store

    def test_the_ranks_meet(self) -> None:
        """One or two ranks on this machine share a store; the second connection gets an empty one."""
        if not self.variables(num_nodes=1, ranks_per_node=1, rank=0, port=29_500):
            given: list[dict[str, str]] = [{}]
        else:
            each, port = (2 if (1, 2) in self.shapes else 1), _free_port()
            given = [
                dict(self.variables(num_nodes=1, ranks_per_node=each, rank=rank, port=port)) for rank in range(each)
            ]
        try:
            found = run_ranks(len(given), _meet, self.spec, dict(self.options), given, timeout_s=60.0)
        except RanksFailed as error:
            broken(MET, str(error))
        problem = next((text for text in found if text), "")
        if problem:
            broken(MET, problem)


def _misfit(world: World) -> str:
    """Describe the numbers that contradict each other."""
    for rank, size in (("global_rank", "world_size"), ("local_rank", "local_world_size"), ("node_rank", "num_nodes")):
        if not 0 <= getattr(world, rank) < getattr(world, size):
            return f"{rank}={getattr(world, rank)} is not at least 0 and below {size}={getattr(world, size)}"
    if world.local_world_size * world.num_nodes != world.world_size:
        return f"{world.num_nodes} nodes with {world.local_world_size} ranks each are not {world.world_size} ranks"
    return ""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _meet(world: World, spec: str, options: dict[str, Any], given: list[dict[str, str]]) -> str:
    """Connect to the store twice, and describe what is wrong. Every rank must call it."""
    import torch

    from plugframe.hooks.context import Context

    mine = given[world.global_rank]
    for name in [n for n in os.environ if n not in _KEPT and not n.startswith(_KEPT_PREFIXES)]:
        del os.environ[name]
    os.environ.update(mine)
    plugin = _made(spec, options)
    place = plugin.environment_world()
    context = Context(world=place, device=torch.device("cpu"), hooks=None, names={})
    before = _listening()
    for time in ("first", "second"):
        store = plugin.environment_store(context=context, timeout_s=20.0)
        if store.check([f"word/{place.global_rank}"]):
            return f"the {time} connection sees what the one before left in the store"
        store.set(f"word/{place.global_rank}", f"{time} {place.global_rank}")
        for rank in range(place.world_size):
            word = store.get(f"word/{rank}").decode()
            if word != f"{time} {rank}":
                return f"at the {time} connection rank {place.global_rank} reads {word!r} of rank {rank}"
        store.set(f"done/{place.global_rank}", "")
        store.wait([f"done/{rank}" for rank in range(place.world_size)])
    wide = sorted(
        address for address in _listening() - before if not address.startswith(("127.", "::1", "::ffff:127."))
    )
    return f"on one node rank {place.global_rank} listens on {', '.join(wide)}" if wide else ""


def _made(spec: str, options: dict[str, Any]) -> Any:
    from plugframe.core.registry.registry import Registry

    registry = Registry.discover()
    return registry.make(registry.find("environment", spec), options)


def _listening() -> set[str]:
    """Return the addresses this process listens on, where the system lists them."""
    inodes = set()
    for link in Path("/proc/self/fd").iterdir() if Path("/proc/self/fd").exists() else ():
        try:
            inodes.add(os.readlink(link).rpartition("[")[2].rstrip("]"))
        except OSError:
            continue  # the descriptor of the listing itself
    found = set()
    for table, family, width in (("tcp", socket.AF_INET, 4), ("tcp6", socket.AF_INET6, 16)):
        path = Path("/proc/self/net") / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                # Each word of 4 bytes is in the order of this machine.
                raw = b"".join(bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, 2 * width, 8))
                found.add(f"{socket.inet_ntop(family, raw)}:{int(port, 16)}")
    return found
