"""Environments: who is detected, what world it reports, what it refuses, and where the ranks meet."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugframe import Plugin
from plugframe.errors import EnvironmentMismatchError
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins.slurm.lists import expand_hosts, expand_tasks
from plugframe_builtins.torchelastic.attempt import only_this_attempt

NAMES = ("torchelastic", "slurm", "mpi", "lsf", "kubeflow", "local")
#: What the variables of all environments, and of the launchers around them, begin with.
PREFIXES = (
    *("SLURM", "OMPI_", "PMI_", "PMIX_", "MPI_", "I_MPI_", "LSB_", "JSM_", "KUBERNETES", "PET_"),
    *("TORCHELASTIC", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "ENVIRONMENT"),
)

TORCHRUN = {
    **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"},
    **{
        "GROUP_WORLD_SIZE": "2",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "none",
    },
}
BY_HAND = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
BATCH = {
    **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[07-09]", "SLURM_NTASKS": "6", "SLURM_NNODES": "3"},
    **{"SLURM_TASKS_PER_NODE": "2(x3)", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
    **{"ENVIRONMENT": "BATCH"},
}
SRUN = {
    **BATCH,
    **{"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3"},
    **{"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "n[08-09]", "SLURM_LOCALID": "1"},
    "SLURM_NODEID": "1",
}
SRUN_ONE_NODE = {
    **SRUN,
    **{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"},
    **{"SLURM_PROCID": "1", "SLURM_NODEID": "0"},
}
SRUN_SHELL = {**SRUN_ONE_NODE, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_PTY_PORT": "34889"}
# SLURM gives the shell that salloc opens on the first node a step number that is none of srun's.
SALLOC_STEP = {**SRUN_SHELL, "SLURM_STEP_ID": "4294967290", "ENVIRONMENT": ""}
SALLOC = {k: v for k, v in BATCH.items() if k not in ("ENVIRONMENT", "SLURM_PROCID")}
OPEN_MPI = {
    **{"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
    **{
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "OMPI_COMM_WORLD_NODE_RANK": "0",
        "PMIX_NAMESPACE": "prterun-n1-77@1",
    },
}
OPEN_MPI_ONE_NODE = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
JSRUN = {
    **{"LSB_JOBID": "31415", "LSB_MCPU_HOSTS": "batch3 1 h41 42 h42 42", "JSM_NAMESPACE_RANK": "7"},
    **{"JSM_NAMESPACE_SIZE": "12", "JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_LOCAL_SIZE": "6"},
}
POD = {
    **{"KUBERNETES_PORT": "tcp://10.0.0.1:443", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"},
    **{"WORLD_SIZE": "3", "RANK": "2"},
}

Set = Callable[[Mapping[str, str]], None]


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Set:
    """Clear what launchers set, and return a function that replaces it."""

    def replace(given: Mapping[str, str]) -> None:
        for name in list(os.environ):
            if name.startswith(PREFIXES):
                monkeypatch.delenv(name)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    replace({})
    return replace


def descriptor(name: str) -> Plugin:
    plugin = import_module(f"plugframe_builtins.{name}").plugin
    assert isinstance(plugin, Plugin)
    return plugin


def make(name: str) -> Any:
    module, _, attribute = descriptor(name).factory.partition(":")
    return getattr(import_module(module), attribute)()


def detected() -> str:
    """Detect as "auto" does: by priority, of those whose variables are all set."""
    for name in sorted(NAMES, key=lambda name: -(descriptor(name).priority or 0)):
        if all(v in os.environ for v in descriptor(name).variables) and make(name).environment_detect():
            return name
    raise AssertionError("local is always detected")


def context(world: World) -> Context:
    import torch

    return Context(world=world, device=torch.device("cpu"), hooks=None, names={})


@pytest.mark.parametrize(
    ("given_variables", "name"),
    [
        ({}, "local"),
        (TORCHRUN, "torchelastic"),
        (BY_HAND, "torchelastic"),
        (SRUN, "slurm"),
        (SRUN_ONE_NODE, "slurm"),
        ({**SRUN, **TORCHRUN}, "torchelastic"),
        ({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4"}, "slurm"),
        ({**SRUN, **OPEN_MPI, "PMIX_NAMESPACE": "slurm.pmix.4711.0"}, "slurm"),
        ({**SRUN_SHELL}, "local"),
        ({**SRUN_SHELL, **SRUN, "SLURM_STEP_ID": "1"}, "slurm"),
        (SALLOC, "local"),
        (SALLOC_STEP, "local"),
        # Detected, to be refused: see test_a_batch_script_without_srun_is_told_to_type_it.
        (BATCH, "slurm"),
        ({**BATCH, "SLURM_NTASKS": "1"}, "local"),
        ({**BATCH, **OPEN_MPI}, "mpi"),
        # The daemons of an mpirun on other nodes are started by srun, and their ranks inherit its variables.
        ({**SRUN, **OPEN_MPI}, "mpi"),
        ({**BATCH, **HYDRA}, "mpi"),
        ({**SALLOC, **TORCHRUN}, "torchelastic"),
        (OPEN_MPI, "mpi"),
        (HYDRA, "mpi"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "local"),
        ({**OPEN_MPI, **TORCHRUN}, "torchelastic"),
        (JSRUN, "lsf"),
        ({**JSRUN, **OPEN_MPI}, "lsf"),
        ({"LSB_JOBID": "1", **OPEN_MPI}, "mpi"),
        ({"LSB_JOBID": "1", "LSB_MCPU_HOSTS": "h1 4"}, "local"),
        (POD, "kubeflow"),
        ({**POD, **TORCHRUN}, "torchelastic"),
        ({**POD, **OPEN_MPI}, "mpi"),
        ({**POD, **SRUN}, "slurm"),
        ({"KUBERNETES_PORT": "tcp://10.0.0.1:443"}, "local"),
    ],
)
def test_the_innermost_launcher_is_detected(variables: Set, given_variables: dict[str, str], name: str) -> None:
    """Of all environments, the one whose launcher started the ranks is chosen under auto."""
    variables(given_variables)
    assert detected() == name


@pytest.mark.parametrize(
    ("name", "given_variables", "world"),
    [
        ("torchelastic", TORCHRUN, (5, 1, 1, 8, 4, 2)),
        ("torchelastic", BY_HAND, (1, 1, 0, 2, 2, 1)),
        ("torchelastic", {**BY_HAND, "MASTER_ADDR": "node1", "LOCAL_WORLD_SIZE": "2"}, (1, 1, 0, 2, 2, 1)),
        (
            "torchelastic",
            {**BY_HAND, "MASTER_ADDR": "node1", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"},
            (1, 0, 1, 2, 1, 2),
        ),
        (
            "torchelastic",
            {**BY_HAND, "MASTER_ADDR": "node1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
            (0, 0, 0, 1, 1, 1),
        ),
        ("slurm", SRUN, (3, 1, 1, 4, 2, 2)),
        ("slurm", SRUN_ONE_NODE, (1, 1, 0, 2, 2, 1)),
        # Ranks dealt out node by node in turn (srun --distribution=cyclic).
        ("slurm", {**SRUN, "SLURM_PROCID": "2", "SLURM_NODEID": "0"}, (2, 1, 0, 4, 2, 2)),
        ("mpi", OPEN_MPI, (2, 0, 1, 4, 2, 2)),
        ("mpi", OPEN_MPI_ONE_NODE, (2, 2, 0, 4, 4, 1)),
        ("mpi", HYDRA, (1, 1, 0, 2, 2, 1)),
        ("lsf", JSRUN, (7, 1, 1, 12, 6, 2)),
        ("kubeflow", POD, (2, 0, 2, 3, 1, 3)),
        ("kubeflow", {**POD, "PET_NPROC_PER_NODE": "auto"}, (2, 0, 2, 3, 1, 3)),
        ("local", {}, (0, 0, 0, 1, 1, 1)),
    ],
)
def test_world_is_read_from_the_variables(
    variables: Set, name: str, given_variables: dict[str, str], world: tuple[int, ...]
) -> None:
    """Each environment reports global, local and node rank, and the sizes, that its launcher set."""
    variables(given_variables)
    found = make(name).environment_world()
    assert found == World(
        global_rank=world[0],
        local_rank=world[1],
        node_rank=world[2],
        world_size=world[3],
        local_world_size=world[4],
        num_nodes=world[5],
    )


@pytest.mark.parametrize(
    ("name", "given_variables", "message"),
    [
        ("torchelastic", {**TORCHRUN, "RANK": "8"}, "RANK=8 is not at least 0 and below WORLD_SIZE=8"),
        ("torchelastic", {**TORCHRUN, "RANK": "-1"}, "RANK=-1 is not at least 0 and below WORLD_SIZE=8"),
        (
            "torchelastic",
            {**TORCHRUN, "LOCAL_RANK": "4"},
            "LOCAL_RANK=4 is not at least 0 and below LOCAL_WORLD_SIZE=4",
        ),
        ("torchelastic", {**TORCHRUN, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3 times .*WORLD_SIZE=8"),
        (
            "torchelastic",
            {**TORCHRUN, "LOCAL_WORLD_SIZE": "0"},
            "LOCAL_WORLD_SIZE=0 times .*WORLD_SIZE=8",
        ),
        ("torchelastic", {**TORCHRUN, "GROUP_RANK": "0"}, "GROUP_RANK=0 is not the node rank, 1"),
        (
            "torchelastic",
            {**TORCHRUN, "GROUP_WORLD_SIZE": "3"},
            "GROUP_WORLD_SIZE=3 is not the number of nodes",
        ),
        ("torchelastic", {**TORCHRUN, "LOCAL_RANK": "0"}, "RANK=5 and LOCAL_RANK=0 .*virtual-local-rank"),
        ("torchelastic", {**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE='many' is not an integer"),
        ("torchelastic", {**BY_HAND, "MASTER_ADDR": "node1"}, "set LOCAL_WORLD_SIZE, or start .* torchrun"),
        ("torchelastic", {**BY_HAND, "LOCAL_RANK": "0"}, "RANK=1 and LOCAL_RANK=0"),
        ("slurm", {**SRUN, "SLURM_PROCID": "4"}, "SLURM_PROCID=4 is not at least 0 and below SLURM_STEP_NUM_TASKS=4"),
        ("slurm", {**SRUN, "SLURM_NODEID": "2"}, "SLURM_NODEID=2 is not at least 0 and below SLURM_STEP_NUM_NODES=2"),
        ("slurm", {**SRUN, "SLURM_LOCALID": ""}, "SLURM_LOCALID='' is not an integer"),
        (
            "slurm",
            {**SRUN, "SLURM_STEP_NUM_TASKS": "6"},
            "SLURM_STEP_TASKS_PER_NODE=2 times SLURM_STEP_NUM_NODES=2 is not SLURM_STEP_NUM_TASKS=6",
        ),
        (
            "slurm",
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"},
            r"SLURM_STEP_TASKS_PER_NODE=2\(x3\),1: every node .* 'srun --ntasks-per-node=1'",
        ),
        ("slurm", {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2x3"}, "'2x3' does not say how many tasks"),
        ("slurm", SALLOC, "started without srun"),
        ("mpi", {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "3"}, "OMPI_COMM_WORLD_LOCAL_SIZE=2 times .*_SIZE=3"),
        ("mpi", {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "mpirun --rank-by slot"),
        ("mpi", {**HYDRA, "PMI_RANK": "2"}, "PMI_RANK=2 is not at least 0 and below PMI_SIZE=2"),
        ("mpi", {}, "OMPI_COMM_WORLD_RANK is not set"),
        (
            "lsf",
            {**JSRUN, "JSM_NAMESPACE_RANK": "12"},
            "JSM_NAMESPACE_RANK=12 is not at least 0 and below JSM_NAMESPACE_SIZE=12",
        ),
        ("kubeflow", {**POD, "RANK": "3"}, "RANK=3 is not at least 0 and below WORLD_SIZE=3"),
        ("kubeflow", {**POD, "PET_NPROC_PER_NODE": "4"}, "PET_NPROC_PER_NODE=4, .*'torchrun train.py'"),
    ],
)
def test_contradicting_variables_are_refused(
    variables: Set, name: str, given_variables: dict[str, str], message: str
) -> None:
    """A world whose variables contradict each other is an error that names them and their values."""
    variables(given_variables)
    with pytest.raises(EnvironmentMismatchError, match=message):
        make(name).environment_world()


def test_a_batch_script_without_srun_is_told_to_type_it(variables: Set) -> None:
    """python in an sbatch script of several tasks would train alone: the error says what to type."""
    variables(BATCH)
    with pytest.raises(EnvironmentMismatchError, match=r"SLURM_NTASKS=6.*'srun python train.py'.*environment='local'"):
        make(detected()).environment_world()


@pytest.mark.parametrize(
    ("name", "given_variables", "asked", "message"),
    [
        (
            "torchelastic",
            TORCHRUN,
            (8, None),
            "8 processes on each node .* started 4: .*torchrun --nproc-per-node=8",
        ),
        ("torchelastic", TORCHRUN, (None, 4), "4 nodes .* started 2: .*torchrun --nnodes=4"),
        ("slurm", SRUN, (4, None), "SLURM started 2: type 'srun --ntasks-per-node=4' or set devices=2"),
        ("slurm", SRUN, (2, 8), "SLURM started 2: type 'srun --nodes=8' or set num_nodes=2"),
        ("mpi", OPEN_MPI, (3, None), "MPI started 2: type 'mpirun --map-by ppr:3:node'"),
        ("mpi", HYDRA, (3, None), "MPI started 2: type 'mpirun -ppn 3'"),
        ("lsf", JSRUN, (4, None), "LSF started 6: type 'jsrun .*=4"),
        ("kubeflow", POD, (2, None), "Kubeflow started 1: type 'torchrun --nproc-per-node=2'"),
        ("kubeflow", POD, (None, 2), "Kubeflow started 3: set num_nodes=3"),
    ],
)
def test_what_was_asked_must_be_what_was_started(
    variables: Set,
    name: str,
    given_variables: dict[str, str],
    asked: tuple[int | None, int | None],
    message: str,
) -> None:
    """Another number of processes or nodes is an error with both figures and what to type."""
    variables(given_variables)
    with pytest.raises(EnvironmentMismatchError, match=message):
        make(name).environment_validate(num_processes=asked[0], num_nodes=asked[1])


def test_what_was_started_may_be_asked_for(variables: Set) -> None:
    """The figures of the launcher, or none, are accepted; before anything is started, any are."""
    variables(SRUN)
    make("slurm").environment_validate(num_processes=2, num_nodes=2)
    make("slurm").environment_validate(num_processes=None, num_nodes=None)
    make("local").environment_validate(num_processes=8, num_nodes=4)


@pytest.mark.parametrize("name", NAMES)
def test_only_local_leaves_the_launch_to_plugframe(name: str) -> None:
    """Under a launcher the ranks exist already; in a bare shell they do not."""
    assert make(name).environment_launched() is (name != "local")


@pytest.mark.parametrize(
    ("name", "given_variables", "main"),
    [
        ("torchelastic", TORCHRUN, ("node1", 29500)),
        ("slurm", SRUN, ("n08", 24711)),
        ("slurm", {**SRUN, "SLURM_STEP_ID": "1", "SLURM_JOB_ID": "1004711"}, ("n08", 25720)),
        ("slurm", {**SRUN, "MASTER_ADDR": "n09", "MASTER_PORT": "1234"}, ("n09", 1234)),
        ("slurm", SRUN_ONE_NODE, ("127.0.0.1", 24711)),
        ("mpi", {**OPEN_MPI, "MASTER_ADDR": "n1", "MASTER_PORT": "1234"}, ("n1", 1234)),
        ("mpi", {**HYDRA, "MASTER_PORT": "1234"}, ("127.0.0.1", 1234)),
        ("lsf", JSRUN, ("h41", 21415)),
        ("lsf", {**JSRUN, "LSB_MCPU_HOSTS": "h1 6 h2 6"}, ("h1", 21415)),
        ("lsf", {**JSRUN, "MASTER_ADDR": "h42"}, ("h42", 21415)),
        ("kubeflow", POD, ("job-master-0", 23456)),
    ],
)
def test_all_ranks_derive_where_they_meet(
    variables: Set, name: str, given_variables: dict[str, str], main: tuple[str, int]
) -> None:
    """Host and port come from the job alone, loopback on one node; MASTER_ADDR and MASTER_PORT override them."""
    variables(given_variables)
    assert make(name).main() == main


@pytest.mark.parametrize(
    "identity",
    [
        {"PMIX_NAMESPACE": "prterun-n1-77@1"},
        {"OMPI_MCA_orte_hnp_uri": "99.0;tcp://10.0.0.1:5"},
        {"I_MPI_HYDRA_UUID": "491c0000"},
    ],
)
def test_the_port_of_an_mpirun_on_one_node_follows_from_its_identity(variables: Set, identity: dict[str, str]) -> None:
    """Ranks of one mpirun derive one port, those of another a different one."""

    def port(rank: str, suffix: str = "") -> int:
        shared = {name: value + suffix for name, value in identity.items()}
        variables({**HYDRA, "PMI_RANK": rank, "MPI_LOCALRANKID": rank, **shared})
        host, found = make("mpi").main()
        assert host == "127.0.0.1"
        return int(found)

    assert port("0") == port("1") != port("0", suffix="x")
    assert 20_000 <= port("0") < 30_000


def test_mpich_ranks_share_their_parent(variables: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPICH names no job: ranks that lead their sessions share a parent, others must be given a port."""
    variables(HYDRA)
    monkeypatch.setattr(os, "getppid", lambda: 4242)
    monkeypatch.setattr(os, "getsid", lambda pid: os.getpid())
    assert make("mpi").main() == ("127.0.0.1", 24242)
    monkeypatch.setattr(os, "getsid", lambda pid: 1)
    with pytest.raises(EnvironmentMismatchError, match="'mpirun -genv MASTER_PORT 29500 …'"):
        make("mpi").main()


@pytest.mark.parametrize(
    ("given_variables", "message"),
    [
        (OPEN_MPI, "'mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=29500 …'"),
        ({**OPEN_MPI, "MASTER_ADDR": "n1"}, "MASTER_ADDR=n1 and MASTER_PORT= must both"),
        ({**HYDRA, "PMI_SIZE": "4"}, "'mpirun -genv MASTER_ADDR <host of rank 0> -genv MASTER_PORT 29500 …'"),
    ],
)
def test_mpi_on_several_nodes_must_be_told_where_to_meet(
    variables: Set, given_variables: dict[str, str], message: str
) -> None:
    """Nothing mpirun sets names the host of rank 0: the error says how to hand it to all ranks."""
    variables(given_variables)
    with pytest.raises(EnvironmentMismatchError, match=re.escape(message)):
        make("mpi").main()


def test_lsf_reads_a_rankfile(variables: Set, tmp_path: Any) -> None:
    """Without LSB_MCPU_HOSTS the hosts are those of the rank file; too few of them are an error."""
    file = tmp_path / "rankfile"
    file.write_text("batch3\nh41\nh41\nh42\nh42\n")
    variables({**JSRUN, "LSB_MCPU_HOSTS": "", "LSB_DJOB_RANKFILE": str(file)})
    assert make("lsf").main() == ("h41", 21415)
    file.write_text("h41\nh41\n")
    with pytest.raises(EnvironmentMismatchError, match=r"runs on 2 hosts, .* name 1: set MASTER_ADDR"):
        make("lsf").main()


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("b2", ["b2"]),
        ("a[1-3,7],b2", ["a1", "a2", "a3", "a7", "b2"]),
        ("n[008-011]", ["n008", "n009", "n010", "n011"]),
        ("n[9-10]-ib,login.site", ["n9-ib", "n10-ib", "login.site"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("a-b,[3-4]", ["a-b", "3", "4"]),
    ],
)
def test_host_lists_are_expanded(text: str, hosts: list[str]) -> None:
    """Ranges, lists, several brackets, zeros and suffixes of SLURM's host lists come out in order."""
    assert list(expand_hosts("NODES", text)) == hosts


@pytest.mark.parametrize("text", ["", "a[1-3", "a1-3]", "a[]", "a[3-1]", "a[x]", "a,,b", "a[[1]]", "a[1-2-3]"])
def test_a_broken_host_list_is_refused(text: str) -> None:
    """What is not a list of hosts is an error that names the variable and the way round it."""
    with pytest.raises(EnvironmentMismatchError, match=r"NODES.*set MASTER_ADDR"):
        list(expand_hosts("NODES", text))


def compress(hosts: list[tuple[str, int, int]]) -> str:
    """Write hosts (prefix, width, number) as SLURM does: runs of numbers of one prefix and width in brackets."""
    groups = []
    for (prefix, width), group in groupby(hosts, key=lambda host: host[:2]):
        numbers = [number for _, _, number in group]
        pieces = []
        for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
            ends = [number for _, number in run]
            first, last = (f"{ends[0]:0{width}d}", f"{ends[-1]:0{width}d}")
            pieces.append(first if first == last else f"{first}-{last}")
        bracketed = len(pieces) > 1 or "-" in pieces[0]
        groups.append(f"{prefix}[{','.join(pieces)}]" if bracketed else f"{prefix}{pieces[0]}")
    return ",".join(groups)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z][a-z-]{0,5}", fullmatch=True), st.integers(1, 4), st.integers(0, 120)),
        min_size=1,
        max_size=30,
    )
)
def test_expanding_undoes_compressing(hosts: list[tuple[str, int, int]]) -> None:
    """Whatever hosts a list is made of, expanding it gives them back."""
    expected = [f"{prefix}{number:0{width}d}" for prefix, width, number in hosts]
    assert list(expand_hosts("NODES", compress(hosts))) == expected


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_tasks_of_each_node_are_expanded(tasks: list[int]) -> None:
    """SLURM's counts with repetitions give back the tasks of every node."""
    runs = [(count, len(list(run))) for count, run in groupby(tasks)]
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in runs)
    assert list(expand_tasks("TASKS", text)) == tasks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_ranks(world_size: int, work: Callable[[int], Any]) -> list[Any]:
    """Return what `work` returns for each rank, run in threads side by side; raise what one raises."""
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:  # noqa: BLE001 (it is raised again below)
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(world_size)]


def one_node(rank: int, world_size: int = 2) -> World:
    return World(global_rank=rank, local_rank=rank, world_size=world_size, local_world_size=world_size)


def test_a_single_rank_opens_no_socket(variables: Set) -> None:
    """With one rank there is nobody to meet: the store stays in the process."""
    variables({})
    store = make("local").environment_store(context=context(World()), timeout_s=5.0)
    store.set("key", "value")
    assert type(store).__name__ == "HashStore"


def test_ranks_of_one_node_meet_on_loopback_only_and_again(variables: Set) -> None:
    """The store is reached on loopback and nowhere else; a second connection reads nothing of the first."""
    port = free_port()
    variables({**SRUN_ONE_NODE, "MASTER_PORT": str(port)})
    environment = make("slurm")

    def meet(rank: int) -> Any:
        return environment.environment_store(context=context(one_node(rank)), timeout_s=30.0)

    first = on_ranks(2, meet)
    # All of 127.0.0.0/8 is this host: another of its addresses stands for the network.
    with pytest.raises(OSError, match=r"refused|assign|timed out"):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    first[0].set("address", "old")
    assert first[1].get("address") == b"old"
    second = on_ranks(2, meet)
    assert not second[1].check(["address"])
    second[1].set("address", "new")
    assert (second[0].get("address"), first[0].get("address")) == (b"new", b"old")


def test_a_taken_port_is_named(variables: Set) -> None:
    """Another job's port is an error that says which, and what to set."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        variables({**SRUN_ONE_NODE, "MASTER_PORT": str(port)})
        with pytest.raises(EnvironmentMismatchError, match=f"127.0.0.1:{port} .*MASTER_PORT to a free port"):
            make("slurm").environment_store(context=context(one_node(0)), timeout_s=5.0)


def test_what_is_no_port_is_refused(variables: Set) -> None:
    """A port out of range is refused before it is tried."""
    variables({**SRUN_ONE_NODE, "MASTER_PORT": "99999"})
    with pytest.raises(EnvironmentMismatchError, match="MASTER_PORT=99999 is not a port"):
        make("slurm").environment_store(context=context(one_node(0)), timeout_s=5.0)


def test_the_store_of_torchruns_agent_is_used(variables: Set) -> None:
    """With the agent's store no rank serves one, and every connection has a prefix that all ranks share."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    agent = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    variables({**BY_HAND, "MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"})
    environment = make("torchelastic")

    def meet(rank: int) -> Any:
        return environment.environment_store(context=context(one_node(rank)), timeout_s=30.0)

    first, second = on_ranks(2, meet), on_ranks(2, meet)
    first[0].set("address", "old")
    assert first[1].get("address") == b"old"
    assert not second[1].check(["address"])


def test_an_attempt_that_died_half_way_does_not_mislead_the_next() -> None:
    """Ranks started again meet each other, whichever of the ranks before them had come to the store."""
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    agent = HashStore()
    for dead in (1, 2):  # came, and died before rank 0 answered
        agent.set(f"plugframe/attempt/come/{dead}", f"dead {dead}")
    stores = on_ranks(3, lambda rank: only_this_attempt(agent, one_node(rank, 3), timeout_s=30.0))
    for rank, store in enumerate(stores):
        store.set(str(rank), "here")
    assert all(store.check(["0", "1", "2"]) for store in stores)
    # Each rank may run ahead of the others into its next connection.
    pairs = on_ranks(3, lambda rank: [only_this_attempt(agent, one_node(rank, 3), timeout_s=30.0) for _ in range(5)])
    for connection in range(5):
        pairs[0][connection].set("connection", str(connection))
    assert [[int(store.get("connection")) for store in mine] for mine in pairs] == [list(range(5))] * 3


def test_a_rank_that_stays_away_is_named() -> None:
    """Rank 0 does not wait for ever for the others."""
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    with pytest.raises(EnvironmentMismatchError, match=r"1 of 2 ranks did not come within 0\.05 s, rank 1"):
        only_this_attempt(HashStore(), one_node(0), timeout_s=0.05)


def test_descriptors_are_light() -> None:
    """Loading the descriptors imports neither torch nor an implementation."""
    code = (
        "import sys\nfrom importlib import import_module\n"
        f"for name in {NAMES!r}: import_module(f'plugframe_builtins.{{name}}').plugin\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "assert not [m for m in sys.modules if m.startswith('plugframe_builtins.') and m.count('.') > 1]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
