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
    # Without what was being handled: its traceback would come first.
    raise pytest.fail.Exception(f"{rule}: {found}", pytrace=False) from None


def one_line(error: BaseException) -> str:
    """Return the error as a message shows it."""
    return f"{type(error).__name__}: {error}"


class Alone(Environment):
    """One process that nobody started, whatever variables are set."""

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
    """Keeps the context of the job it takes part in."""

    context: Context

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self.context = context


@contextmanager
def running(*, alone: bool = True, plugins: tuple[Any, ...] = (), **settings: Any) -> Iterator[tuple[Lite, Context]]:
    """Run a job on the CPU and give its `Lite` and what its plugins see of it.

    Args:
        alone: whether it is of one rank, whatever started this process; otherwise of those that exist.
        plugins: extensions besides.
        settings: of the `Lite`.
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
    """Return the name of the accelerator that needs no device but the CPU."""
    registry = Registry.discover()
    for entry in registry.entries("accelerator"):
        try:
            if registry.describe(entry).devices == ("cpu",):
                return entry.qualified
        except PluginError:
            continue  # somebody else's broken package
    raise LookupError("No accelerator for the CPU is installed: install plugframe again.")


def once(suite: object, what: str, make: Callable[[], T]) -> T:
    """Return what `make` gives, made once for all tests of a suite: starting processes takes long."""
    kept: dict[str, T] = vars(type(suite)).get("_kept") or {}
    if what not in kept:
        kept[what] = make()
        setattr(type(suite), "_kept", kept)  # noqa: B010 - of this very class, not of one it inherits from
    return kept[what]


def lasting(found: dict[str, Any]) -> dict[str, Any]:
    """Return those `traces` that no library changes on its first use, so that a first run is held to them too."""
    names = ("environment variables", "the working folder", "signal handlers", "sys.excepthook")
    return {name: found[name] for name in names}


def listing(folder: Path) -> set[str]:
    """Return every file and folder below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def chosen(kind: str, spec: str, options: dict[str, Any]) -> Any:
    """Return what selects a plugin in ``Lite(...)``: its name, or an object where it needs options."""
    if not options:
        return spec
    registry = Registry.discover()
    return registry.make(registry.find(kind, spec), options)
