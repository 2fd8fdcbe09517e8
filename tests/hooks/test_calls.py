"""Calls of hooks give what pluggy's give: results, errors and order, with any wrappers around."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import pluggy
import pytest

from plugframe.hooks.calls import call_of

spec, impl = pluggy.HookspecMarker("calls"), pluggy.HookimplMarker("calls")
notes: list[str] = []


class Specs:
    @spec(firstresult=True)
    def one(self, a: Any, b: Any, c: Any) -> Any: ...
    @spec
    def many(self, a: Any, b: Any, c: Any) -> Any: ...


class Provider:
    @impl
    def one(self, b: Any, a: Any) -> Any:
        notes.append("one")
        if isinstance(b, BaseException):
            raise b
        return a

    @impl
    def many(self, c: Any) -> Any:
        notes.append("many")
        return c


class Other:
    @impl
    def many(self) -> Any:
        notes.append("other")
        return "other"


class Around:
    @impl(wrapper=True)
    def one(self, a: Any, b: Any, c: Any) -> Generator[None, Any, Any]:
        notes.append("in")
        try:
            return (yield), c
        finally:
            notes.append("out")

    @impl(wrapper=True)
    def many(self, c: Any) -> Generator[None, Any, Any]:
        notes.append("in")
        return [*(yield), c]


class Handling:
    @impl(wrapper=True)
    def one(self) -> Generator[None, Any, Any]:
        try:
            return (yield)
        except (ValueError, StopIteration) as error:
            return type(error).__name__


class Replacing:
    @impl(wrapper=True)
    def one(self, c: Any) -> Generator[None, Any, Any]:
        try:
            yield
        except ValueError as error:
            raise KeyError("replaced") from error
        raise OSError("after")


class Refusing:
    @impl(wrapper=True)
    def one(self) -> Generator[None, Any, Any]:
        raise ValueError("before")
        yield


class Silent:
    @impl(wrapper=True)
    def one(self) -> Generator[None, Any, Any]:
        if False:
            yield


class Twice:
    @impl(wrapper=True)
    def one(self) -> Generator[None, Any, Any]:
        for _ in range(2):
            with suppress(ValueError):
                yield


def outcome(call: Callable[[], Any]) -> Any:
    """Return what a call returns or raises, and what ran."""
    notes.clear()
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001 - any is compared
        text = "" if isinstance(error, RuntimeError) else str(error)
        return type(error), text, type(error.__cause__), list(notes)
    return result, list(notes)


WRAPPERS: list[tuple[type, ...]] = [
    (),
    (Around,),
    (Handling, Around),
    (Around, Handling),
    (Replacing, Handling),
    (Handling, Replacing),
    (Refusing, Handling),
    (Around, Refusing),
    (Silent,),
    (Twice,),
    (Around, Around),
]


@pytest.mark.parametrize("wrappers", WRAPPERS, ids=lambda each: "-".join(w.__name__ for w in each))
def test_calls_are_pluggys(wrappers: tuple[type, ...]) -> None:
    """With no wrapper and several, those that handle, replace and raise errors, and those that are wrong."""
    manager = pluggy.PluginManager("calls")
    manager.add_hookspecs(Specs)
    for plugin in (Provider(), Other(), *(wrapper() for wrapper in wrappers)):
        manager.register(plugin)
    one, many = call_of(manager.hook.one), call_of(manager.hook.many)
    assert not isinstance(one, pluggy.HookCaller)
    assert not isinstance(many, pluggy.HookCaller)
    for b in (2, None, ValueError("wrong"), StopIteration(5), RuntimeError("x"), KeyboardInterrupt()):
        arguments = {"a": 1, "b": b, "c": 3}
        assert outcome(lambda: one(**arguments)) == outcome(lambda: manager.hook.one(**arguments))  # noqa: B023
    for c in (None, 3):
        arguments = {"a": 1, "b": 2, "c": c}
        assert outcome(lambda: many(**arguments)) == outcome(lambda: manager.hook.many(**arguments))  # noqa: B023


def test_a_wrong_wrapper_is_named() -> None:
    """One that does not yield once: by its name, with the line it begins at."""
    for wrapper, said in ((Silent(), "did not yield"), (Twice(), "has second yield")):
        manager = pluggy.PluginManager("calls")
        manager.add_hookspecs(Specs)
        manager.register(Provider())
        manager.register(wrapper)
        with pytest.raises(RuntimeError, match=rf"The hook wrapper 'one' {said}: .*test_calls\.py:\d+"):
            call_of(manager.hook.one)(a=1, b=2, c=3)


def test_what_is_rare_is_left_to_pluggy() -> None:
    """Implementations with defaults, and wrappers of the old style."""

    class Optional:
        @impl
        def one(self, a: Any = 5) -> Any:
            return a

    class Old:
        @impl(hookwrapper=True)
        def one(self) -> Generator[None, Any, None]:
            yield

    for plugins in ((Optional(),), (Provider(), Old())):
        manager = pluggy.PluginManager("calls")
        manager.add_hookspecs(Specs)
        for plugin in plugins:
            manager.register(plugin)
        assert call_of(manager.hook.one) is manager.hook.one
