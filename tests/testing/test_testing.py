"""What plugin authors get for tests of their own: ranks, an isolated registry, simulated devices and clusters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paths import ROOT
from plugframe import Lite, Plugin, SettingError, UnknownPluginError
from plugframe.base import Strategy
from plugframe.core.registry.registry import Registry
from plugframe.hooks.world import World
from plugframe.testing import FakeAccelerator, RanksFailed, leftovers


class Acme(Strategy):
    """Nobody has published it."""


def total(world: World) -> int:
    with Lite(accelerator=FakeAccelerator(), devices=world.world_size) as lite:
        return int(lite.all_reduce(torch.tensor(world.global_rank + 1), reduce_op="sum").item())


def burst(world: World) -> None:
    print(f"rank {world.global_rank} is here")
    if world.global_rank == 1:
        raise ValueError("out of paper")


def vanish(world: World) -> None:
    if world.global_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def test_importing_it_is_light(run_python: Callable[[str], str]) -> None:
    """Neither the package nor the pytest plugin imports torch, and the core never imports either."""
    code = "import sys, plugframe.testing\nprint('torch' in sys.modules, 'pytest' in sys.modules)"
    assert run_python(code).split() == ["False", "False"]
    code = "import sys, plugframe.testing.pytest_plugin\nprint('torch' in sys.modules, 'plugframe.lite' in sys.modules)"
    assert run_python(code).split() == ["False", "False"]
    code = (
        "import sys\nfrom plugframe import Lite\nprint([m for m in sys.modules if m.startswith('plugframe.testing')])"
    )
    assert run_python(code).strip() == "[]"


LOADED = """
import sys

def test_what_is_loaded():
    ours = sorted(name for name in sys.modules if name.split(".")[0] in ("plugframe", "plugframe_builtins", "torch"))
    assert ours == ["plugframe", "plugframe.testing", "plugframe.testing.pytest_plugin"]
"""


def test_other_peoples_tests_load_nothing(tmp_path: Path) -> None:
    """In a run of pytest that asks for none of the fixtures, the plugin is there and nothing else of plugframe."""
    (tmp_path / "test_loaded.py").write_text(LOADED)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "1 passed" in done.stdout, done.stdout


def test_the_core_never_imports_it() -> None:
    """pytest is an extra: nothing outside of plugframe.testing needs it."""
    folder = ROOT / "plugframe"
    for path in folder.rglob("*.py"):
        if "testing" not in path.relative_to(folder).parts:
            lines = path.read_text(encoding="utf-8").splitlines()
            imports = [line.strip() for line in lines if line.strip().startswith(("import ", "from "))]
            assert not [line for line in imports if "pytest" in line or "plugframe.testing" in line], path


def test_an_isolated_registry_knows_what_a_test_adds(plugframe_registry: Any) -> None:
    """A name that was added is selected like any other; others that are installed are not there."""
    assert all(entry.builtin for entry in Registry.discover().entries())
    plugframe_registry.add("strategy", "acme", Plugin(factory=f"{__name__}:Acme", summary="Nothing."))
    with Lite(accelerator="cpu", devices=1, strategy="acme") as lite:
        assert isinstance(lite.strategy, Acme)
        assert lite.plan.choices["strategy"].origin == "acme (this-test 0)"


def test_an_isolated_registry_lasts_one_test() -> None:
    """What another test has added is gone."""
    with pytest.raises(UnknownPluginError, match="strategy='acme' is not installed"):
        Lite(accelerator="cpu", devices=1, strategy="acme")


def test_ranks_are_real(run_ranks: Callable[..., list[Any]]) -> None:
    """A function runs on every rank of a job, and its results come back in rank order."""
    assert run_ranks(2, total) == [3, 3]


def test_a_rank_that_fails_is_shown(run_ranks: Callable[..., list[Any]]) -> None:
    """The error holds the rank's own traceback and what it printed; one that is killed has its exit code."""
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 raised\n.*in burst\n.*ValueError: out of paper.*rank 1 is here"):
        run_ranks(2, burst)
    with pytest.raises(RanksFailed, match="rank 1 gave no result, then exit code -9"):
        run_ranks(2, vanish)


def test_a_fake_accelerator_has_several_devices(fake_accelerator: str) -> None:
    """It is chosen by itself, has four devices, and refuses a fifth."""
    lite = Lite(environment="local")
    assert lite.plan.choices["accelerator"].name == fake_accelerator
    assert lite.plan.devices == (0, 1, 2, 3)
    assert Lite(environment="local", devices=[1, 3]).plan.devices == (1, 3)
    with pytest.raises(SettingError, match="a count from 1 to 4"):
        Lite(environment="local", devices=5)
    assert FakeAccelerator(num_devices=2).accelerator_parse_devices("auto") == (0, 1)


@pytest.mark.parametrize("started_by", ["torchrun", "srun", "mpirun"])
def test_a_fake_cluster_is_detected(fake_cluster: Callable[..., Any], started_by: str) -> None:
    """Lite takes its place in a job of two nodes from the variables of who would have started it."""
    fake_cluster(num_nodes=2, ranks_per_node=4, rank=5, started_by=started_by)
    lite = Lite(accelerator=FakeAccelerator(), devices=4, num_nodes=2)
    assert lite.plan.world == World(
        global_rank=5, local_rank=1, node_rank=1, world_size=8, local_world_size=4, num_nodes=2
    )


def test_a_fake_cluster_can_change(fake_cluster: Callable[..., Any]) -> None:
    """A second call takes the place of the first; a place that is none is refused."""
    fake_cluster(num_nodes=1, ranks_per_node=2, rank=1)
    fake_cluster(num_nodes=1, ranks_per_node=2, rank=0, started_by="mpirun")
    assert "LOCAL_WORLD_SIZE" not in os.environ
    assert os.environ["OMPI_COMM_WORLD_RANK"] == "0"
    with pytest.raises(ValueError, match="rank=2 is not one of 1 nodes with 2 ranks each"):
        fake_cluster(num_nodes=1, ranks_per_node=2, rank=2)
    with pytest.raises(ValueError, match="started_by='qsub' is not one of torchrun, srun, mpirun"):
        fake_cluster(started_by="qsub")


LITTER = """
import os, tempfile
import pytest

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

def test_variable():
    os.environ["LEFT_BY_A_TEST"] = "1"

def test_file():
    tempfile.mkdtemp(prefix="left-by-a-test")

def test_clean(tmp_path):
    (tmp_path / "file").write_text("")
"""


def test_what_is_left_behind_is_told(tmp_path: Path) -> None:
    """A test under the fixture fails for what it leaves, with the law, and one that leaves nothing passes."""
    (tmp_path / "test_litter.py").write_text(LITTER)
    command = [sys.executable, "-m", "pytest", "-rEA", "-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path)]
    environment = {**os.environ, "COLUMNS": "400"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    law = "Law 9 (nothing is left behind): after the test"
    assert f"test_variable - Failed: {law} environment variables have changed: LEFT" in done.stdout, done.stdout
    assert f"test_file - Failed: {law} temporary files are left: left-by-a-test" in done.stdout, done.stdout
    assert "3 passed, 2 errors" in done.stdout, done.stdout


def test_a_thread_that_ends_while_leftovers_are_looked_for_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listed file may be gone when it is read: it is skipped, and the others are reported."""
    gone = Path("/proc/self/task/0/children")
    listed = [gone, *Path("/proc/self/task").glob("*/children")]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(listed))
    command = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()  # for a moment a new process has no command
        found = leftovers.children()
        child.communicate(b"\n")
    assert len(listed) == 1 or any(str(child.pid) in told for told in found)
