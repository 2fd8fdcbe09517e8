"""Pytest fixtures for plugin authors. Importing this module imports neither torch nor the core."""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from plugframe.testing.isolated import IsolatedRegistry


@pytest.fixture
def plugframe_registry(monkeypatch: pytest.MonkeyPatch) -> IsolatedRegistry:
    """A registry with plugframe's built-in plugins only, without discovery.

    ``plugframe_registry.add("strategy", "acme", Plugin(factory="tests.acme:Acme"))`` makes a name selectable in
    every ``Lite(...)`` of this test, without an entry point. Processes that the test starts do not have it.
    """
    from plugframe.core.registry.registry import Registry
    from plugframe.testing.isolated import IsolatedRegistry

    registry = IsolatedRegistry(Registry.discover().entries())
    monkeypatch.setattr(Registry, "discover", classmethod(lambda cls, *args, **kwargs: registry))
    return registry


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    """Call a function on every rank of a real job: ``run_ranks(2, fn)``; see `plugframe.testing.run_ranks`."""
    from plugframe.testing.ranks import run_ranks

    return run_ranks


@pytest.fixture
def fake_accelerator(plugframe_registry: IsolatedRegistry) -> str:
    """The name of an accelerator with four simulated devices on the CPU, which ``"auto"`` prefers.

    Processes that the test starts do not have the name; pass them `plugframe.testing.FakeAccelerator` itself.
    """
    from plugframe import Plugin

    descriptor = Plugin(
        factory="plugframe.testing.fakes:FakeAccelerator", summary="Four simulated devices.", priority=10_000
    )
    plugframe_registry.add("accelerator", "fake", descriptor)
    return "fake"


@pytest.fixture
def fake_cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Mapping[str, str]]:
    """Make this process a rank of a fake job, by setting the variables of its scheduler or launcher.

    ``fake_cluster(num_nodes=2, ranks_per_node=4, rank=5)`` is torchrun's job; with ``started_by="srun"`` or
    ``"mpirun"`` theirs. It returns the variables.
    """
    from plugframe.testing.fakes import cluster_variables

    mine: set[str] = set()

    def set_variables(**place: Any) -> Mapping[str, str]:
        variables = cluster_variables(**place)
        for name in mine - set(variables):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        mine.update(variables)
        return variables

    return set_variables


@pytest.fixture(scope="session")
def _plugframe_own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Redirect temporary files to a separate folder, to detect files that a test leaves behind."""
    tmp_path_factory.getbasetemp()  # that of pytest stays where it is looked for
    from plugframe.utils.environment import environment

    folder = tempfile.mkdtemp(prefix="plugframe-tests-")
    with environment({"TMPDIR": folder}):
        tempfile.tempdir = None
        yield
        shutil.rmtree(folder, ignore_errors=True)
    tempfile.tempdir = None


@pytest.fixture(scope="session")
def _plugframe_torch_is_warm() -> None:
    """Create the first DDP module of the process now: torch never closes the socket of its group."""
    import torch

    if not torch.distributed.is_available() or torch.distributed.is_initialized():
        return
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))(torch.ones(1, 1))
    torch.distributed.destroy_process_group()


@pytest.fixture
def nothing_left_behind(_plugframe_own_temporary_folder: None, _plugframe_torch_is_warm: None) -> Iterator[None]:
    """A test leaves no process, listening port, temporary file, variable, default dtype or process group.

    Ask for it with ``@pytest.mark.usefixtures("nothing_left_behind")``; the contract suites do.
    """
    from plugframe.testing import leftovers

    before = leftovers.of_tests()
    yield
    found = leftovers.left(before, leftovers.of_tests())
    if found:
        # A module and its engine refer to each other: what they hold goes with the collector, which takes a while.
        gc.collect()
        found = leftovers.left(before, leftovers.of_tests())
    if found:
        pytest.fail(f"Law 9 (nothing is left behind): after the test {found}", pytrace=False)


def pytest_report_header() -> list[str]:
    """Report the version of plugframe under test, if it was imported."""
    version = getattr(sys.modules.get("plugframe"), "__version__", None)
    return [f"plugframe: {version}"] if version else []
