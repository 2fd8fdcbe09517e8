"""Run real jobs with the plugin under test, and check for leftovers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest

from plugframe.base import Environment, Extension
from plugframe.core.registry.registry import Registry
from plugframe.errors import PluginError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe.lite import Lite
from plugframe.testing.leftovers import left, traces

T = TypeVar("T")

__all__ = [
    "Alone",
    "broken",
    "chosen",
    "cpu_accelerator",
    "lasting",
    "left",
    "listing",
    "once",
    "one_line",
    "running",
    "traces",
]


def broken(rule: str, found: str) -> NoReturn:
    """Fail the test with a message that begins with the rule that is broken."""
    # From None: the traceback of an exception that is being handled would come first.
    raise pytest.fail.Exception(f"{rule}: {found}", pytrace=False) from None


def one_line(error: BaseException) -> str:
    """Return the error's class and message."""
    return f"{type(error).__name__}: {error}"


class Alone(Environment):
    """A job of one process, whatever variables are set."""

    @hookimpl
    def environment_detect(self) -> bool:
        return True

    @hookimpl
    def environment_launched(self) -> bool:
        return False

    @hookimpl
    def environment_world(self) -> World:
        return World()

    @hookimpl
    def environment_validate(self, num_processes: int | None, num_nodes: int | None) -> None:
        pass


class _Seen(Extension):
    """Record the context of the job."""

    context: Context

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self.context = context


@contextmanager
def running(*, alone: bool = True, plugins: tuple[Any, ...] = (), **settings: Any) -> Iterator[tuple[Lite, Context]]:
    """Run a job on the CPU, and yield its `Lite` and its context.

    Args:
        alone: whether to run on one rank, even if this process is a rank of a larger job.
        plugins: further extensions.
        settings: arguments of `Lite`.
    """
    seen = _Seen()
    own: dict[str, Any] = {"environment": Alone(), "devices": 1} if alone else {}
    lite = Lite(**{"accelerator": cpu_accelerator(), **own, **settings}, plugins=[*plugins, seen])
    try:
        lite.launch()
        yield lite, seen.context
    finally:
        lite.teardown()


def cpu_accelerator() -> str:
    """Return the name of the accelerator for the CPU."""
    registry = Registry.discover()
    for entry in registry.entries("accelerator"):
        try:
            if registry.describe(entry).devices == ("cpu",):
                return entry.qualified
        except PluginError:
            continue  # a broken package of a third party
    raise LookupError("No accelerator for the CPU is installed: install plugframe again.")


def once(suite: object, what: str, make: Callable[[], T]) -> T:
    """Return the result of `make`, called once for all tests of a suite: starting processes takes long."""
    kept: dict[str, T] = vars(type(suite)).get("_kept") or {}
    if what not in kept:
        kept[what] = make()
        setattr(type(suite), "_kept", kept)  # noqa: B010 - on this class, not on a base class
    return kept[what]


def lasting(found: dict[str, Any]) -> dict[str, Any]:
    """Return those `traces` that no library changes on first use, to check the first run too."""
    names = ("environment variables", "the working folder", "signal handlers", "sys.excepthook")
    return {name: found[name] for name in names}


def listing(folder: Path) -> set[str]:
    """Return every file and folder below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def chosen(kind: str, spec: str, options: dict[str, Any]) -> Any:
    """Return the argument of ``Lite(...)`` for a plugin: its name, or an object if it has options."""
    if not options:
        return spec
    registry = Registry.discover()
    return registry.make(registry.find(kind, spec), options)
