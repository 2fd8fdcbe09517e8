"""The markers `ranks` and `compile`: set from what a test calls, and held to while it runs.

A test is marked `ranks` if it, a fixture it uses, or a function of the tests that either calls, names what starts a
process (`STARTERS`), or if it has a parameter that asks for workers. What is started out of sight, by the command under
test for example, is marked by hand. A test that starts a process and is not marked fails. `compile` goes the same way.
"""

from __future__ import annotations

import multiprocessing.process
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import pytest

#: A function that has one of these names in its code starts processes.
STARTERS = frozenset(
    ("Popen", "fork", "launcher_launch", "mp", "multiprocessing", "popen", "run_checks", "run_ranks", "supervise")
) | {"subprocess"}

#: A function that has all of these names in its code compiles.
COMPILERS = frozenset(("torch", "compile"))

#: Code whose functions are followed: the tests' own, and the contract suites.
_FOLLOWED = ("/tests/", "/plugframe/testing/")

_EVENTS = frozenset(("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"))

#: Programs that the standard library and torch ask about the machine, once per process: whichever test comes first.
_QUERIES = frozenset(("uname", "ldconfig", "gcc", "cc", "ld", "lscpu", "nvidia-smi"))

_UNMARKED = "This test starts a process ({what}): mark it with @pytest.mark.ranks, or do without."
_UNMARKED_FIXTURE = "The fixture {name!r} starts a process: mark this test with @pytest.mark.ranks, or do without it."
_COMPILES = "This test compiles: mark it with @pytest.mark.compile, or do without."


class ProcessRule:
    """A plugin of pytest that marks the tests and holds them to their marks."""

    def __init__(self) -> None:
        self._known: dict[object, frozenset[str]] = {}
        self._refuses = False  # whether the test that runs may start a process
        self._started = ""
        self._fixtures: set[str] = set()  # those wider than a test, seen to start processes
        sys.addaudithook(self._audit)  # it cannot be removed again
        start = multiprocessing.process.BaseProcess.start
        rule = self

        def start_seen(process: Any) -> None:
            rule._note("multiprocessing")  # a fork server's processes raise no audit event
            start(process)

        multiprocessing.process.BaseProcess.start = start_seen  # type: ignore[method-assign]

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Mark what its code or its parameters show, before ``-m`` selects."""
        for item in items:
            if isinstance(item, pytest.Function):
                for marker in sorted(self._shown(item)):
                    item.add_marker(marker)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Refuse processes while a test runs that is not marked."""
        self._refuses, self._started = item.get_closest_marker("ranks") is None, ""
        try:
            return (yield)
        finally:
            self._refuses = False

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """Remember the fixtures that start processes for several tests."""
        before, self._started = self._started, ""
        try:
            return (yield)
        finally:
            if self._started and fixturedef.scope != "function":
                self._fixtures.add(fixturedef.argname)
            self._started = self._started or before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Function) -> Iterator[None]:
        """Fail a test for what it started or compiled unmarked, also where the refusal was caught or came elsewhere."""
        compiled = _frames_compiled()
        result = yield
        if self._refuses and self._started:
            pytest.fail(_UNMARKED.format(what=self._started), pytrace=False)
        if self._refuses and (used := self._fixtures.intersection(item.fixturenames)):
            pytest.fail(_UNMARKED_FIXTURE.format(name=min(used)), pytrace=False)
        if not item.get_closest_marker("compile") and _frames_compiled() != compiled:
            pytest.fail(_COMPILES, pytrace=False)
        return result

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _EVENTS and not (args and Path(str(args[0])).name in _QUERIES):
            self._note(f"{event} {args[0]}" if args else event)

    def _note(self, what: str) -> None:
        self._started = self._started or what
        if self._refuses:
            pytest.fail(_UNMARKED.format(what=what))

    def _shown(self, item: pytest.Function) -> set[str]:
        """Return the markers that an item's functions, fixtures and parameters show."""
        definitions = item._fixtureinfo.name2fixturedefs
        functions = [definition.func for name in item.fixturenames for definition in definitions.get(name, ())[-1:]]
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        shown = {"ranks"} if any(_asks_for_workers(*each) for each in parameters.items()) else set()
        for function in (item.function, *functions, *filter(callable, parameters.values())):
            shown |= self._follow(function, item.cls)
        return shown

    def _follow(self, function: Any, owner: type | None) -> frozenset[str]:
        """Return the markers that a function shows, or one that it calls."""
        while isinstance(function, (MethodType, partial)) or hasattr(function, "__wrapped__"):
            function = getattr(function, "__wrapped__", None) or getattr(function, "func", None) or function.__func__
        if isinstance(function, property):
            function = function.fget
        if not _is_followed(sys.modules.get(getattr(function, "__module__", None) or "")):
            return frozenset()
        if isinstance(function, type):
            members = [each for each in vars(function).values() if isinstance(each, (FunctionType, property))]
            return frozenset().union(*(self._follow(member, function) for member in members))
        if not isinstance(function, FunctionType):
            return frozenset()
        key = (function, owner)
        if key not in self._known:
            self._known[key] = frozenset()  # for those that call each other
            names = _names(function.__code__)
            shown = {"ranks"} if not STARTERS.isdisjoint(names) else set()
            shown |= {"compile"} if names >= COMPILERS else set()
            self._known[key] = frozenset(shown).union(
                *(self._follow(value, owner) for value in _values(names, function, owner))
            )
        return self._known[key]


def _asks_for_workers(name: str, value: object) -> bool:
    return (isinstance(value, str) and "worker" in value) or (
        "workers" in name and isinstance(value, int) and value > 0
    )


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _values(names: set[str], function: FunctionType, owner: type | None) -> Iterator[Any]:
    """Yield what the names in a function's code may stand for: globals, and members of its class and of modules."""
    named = [function.__globals__[name] for name in names if name in function.__globals__]
    holders = [owner, *(value for value in named if isinstance(value, ModuleType) and _is_followed(value))]
    yield from named
    yield from (getattr(holder, name) for holder in holders for name in names if hasattr(holder, name))


def _is_followed(module: ModuleType | None) -> bool:
    path = Path(getattr(module, "__file__", None) or "").as_posix()
    return any(folder in path for folder in _FOLLOWED)


def _frames_compiled() -> int:
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else int(utils.counters["frames"]["total"])
