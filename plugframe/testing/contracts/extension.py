"""The extension contract suite: wrap hooks without side effects other than the documented ones."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from plugframe import base
from plugframe.core.planning.plan import Choice
from plugframe.core.runtime.binding import Binding
from plugframe.hooks import KINDS, Plugin, hookimpl
from plugframe.hooks.context import Context
from plugframe.hooks.markers import PROJECT
from plugframe.hooks.world import World
from plugframe.testing.contracts import states
from plugframe.testing.contracts.extension_ranks import train, train_on_ranks
from plugframe.testing.contracts.extension_state import EQUAL, STATE, ExtensionStateContract, distinguish
from plugframe.testing.contracts.running import broken, lasting, left, one_line, traces
from plugframe.testing.ranks import RanksFailed, run_ranks

WRAPS = "Wraps (an extension wraps hooks with hookimpl(wrapper=True) or implements on_… hooks; it provides none)"
ONCE = "Once (a wrapped hook is called once for each call, with the arguments of the call)"
RESULT = "Result (a wrapper returns the result of the hook)"
RAISED = "Raised (an exception of a hook passes through a wrapper unchanged)"
TRAINING = "Training (a run ends with the same weights as without the extension)"
BALANCED = "Balanced (on_teardown undoes on_launch, in every run)"
OBJECT = "Object (load_state_dict() restores what state_dict() returned)"
CLEAN = "Law 9 (nothing is left behind)"

__all__ = [
    "BALANCED",
    "CLEAN",
    "EQUAL",
    "OBJECT",
    "ONCE",
    "RAISED",
    "RESULT",
    "STATE",
    "TRAINING",
    "WRAPS",
    "ExtensionContract",
]


class ExtensionContract(ExtensionStateContract):
    """Subclass it and set `spec`.

    Attributes:
        changes: hooks whose result or arguments the extension changes, as documented.
        changes_training: whether it changes the weights of a run, as documented.
    """

    kind = "extension"
    changes: ClassVar[tuple[str, ...]] = ()
    changes_training: ClassVar[bool] = False

    @pytest.fixture(autouse=True)
    def _own_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An extension may write files into the working folder."""
        folder = tmp_path / "working folder"
        folder.mkdir()
        monkeypatch.chdir(folder)

    def wrapped(self, plugin: Any) -> list[str]:
        """Return the provider and logger hooks the extension wraps."""
        return [name for name, marks in _marks(plugin).items() if marks["wrapper"] and name in _all_hooks()]

    # ------------------------------------------------------------------ methods

    def test_it_only_wraps_and_listens(self) -> None:
        """Every marked method wraps an existing hook, or implements a notification."""
        marks = _marks(self.make())
        if not marks:
            broken(WRAPS, "no method of it is marked with @plugframe.hookimpl, so it would never be called")
        notifications = KINDS["extension"].hooks
        for name, marked in marks.items():
            if name not in _all_hooks():
                broken(WRAPS, f"{name} is not a hook")
            if name not in notifications and marked["hookwrapper"]:
                broken(WRAPS, f"{name} is an old-style wrapper: mark it with hookimpl(wrapper=True)")
            if name not in notifications and not marked["wrapper"]:
                broken(WRAPS, f"{name} provides the hook: mark it with hookimpl(wrapper=True) and yield once")

    # ------------------------------------------------------------------ wrappers

    def _each_wrapped(self) -> Iterator[tuple[str, _Called, Any]]:
        """Yield each wrapped hook, the recorder of its calls, and the bound hook of a binding."""
        names = self.wrapped(self.make())
        if not names:
            pytest.skip("It wraps nothing.")
        for name in names:
            called = _Called(name)
            plugin = self.make()
            hooks = _bound(plugin, called)
            context = _context(hooks)
            _told(plugin, "on_launch", context=context)
            yield name, called, getattr(hooks, name)
            _told(plugin, "on_teardown")

    def test_each_call_is_made_once(self) -> None:
        """Two calls reach the provider as two calls, with the same argument objects."""
        for name, called, hook in self._each_wrapped():
            for number in (1, 2):
                arguments = _arguments(name)
                before = dict(arguments)
                called.calls.clear()
                try:
                    _entered(hook(**arguments))
                except Exception as error:  # noqa: BLE001 - reported as it is
                    broken(ONCE, f"call {number} of {name} raised {one_line(error)}")
                if len(called.calls) != 1:
                    broken(ONCE, f"call {number} of {name} reached the provider {len(called.calls)} times")
                changed = [key for key, value in called.calls[0].items() if value is not before[key]]
                if changed and name not in self.changes:
                    broken(ONCE, f"{name} received other arguments than it was called with: {', '.join(changed)}")
                if called.entered != called.left:
                    broken(
                        ONCE, f"the context of {name} was entered {called.entered} times and left {called.left} times"
                    )

    def test_the_result_is_what_the_hook_gave(self) -> None:
        """A wrapper returns the object of the hook; for a context, the object it yields."""
        for name, called, hook in self._each_wrapped():
            if name in self.changes:
                continue
            result = hook(**_arguments(name))
            if called.is_context:
                if not hasattr(result, "__enter__"):
                    broken(RESULT, f"{name} gave {result!r} where the hook gave a context")
                with result as entered:
                    result = entered
            if not _is_what_was_given(result, called.result):
                broken(RESULT, f"{name} gave {result!r} where the hook gave {called.result!r}: `return (yield)`")

    @pytest.mark.parametrize("error", [RuntimeError, StopIteration, KeyboardInterrupt, SystemExit])
    def test_what_a_hook_raises_passes_through(self, error: type[BaseException]) -> None:
        """Exceptions of the hook, and in a context it returned, pass through, SystemExit included."""
        for name, called, hook in self._each_wrapped():
            raised = error("out of paper")
            if called.is_context:
                self._passes(name, raised, lambda: _entered(hook(**_arguments(name)), raised))  # noqa: B023
                if called.entered != called.left:
                    broken(RAISED, f"the context of {name} was not exited after a {error.__name__} in it")
            called.raises = raised
            self._passes(name, raised, lambda: hook(**_arguments(name)))  # noqa: B023

    def _passes(self, name: str, raised: BaseException, call: Callable[[], Any]) -> None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - compared with the exception raised
            # A generator cannot re-raise StopIteration: Python converts it to a RuntimeError.
            if error is not raised and not (isinstance(raised, StopIteration) and error.__cause__ is raised):
                broken(RAISED, f"{name} raised {one_line(raised)}, which became {one_line(error)}")
        else:
            broken(RAISED, f"{name} raised {one_line(raised)}, and the caller got {result!r}")

    # ------------------------------------------------------------------ runs

    def test_a_run_ends_with_the_same_weights(self) -> None:
        """Training with and without it gives the same weights and losses, bit for bit."""
        plain, watched = train([]), train([self.make()])
        differs = states.difference(plain, watched)
        if differs and not self.changes_training:
            broken(TRAINING, f"on one rank: {differs}")

    def test_on_ranks_it_leaves_the_run_as_it_is(self) -> None:
        """Training on two ranks with and without it gives the same weights and losses, and does not hang."""
        if self.descriptor.ranks == "one":
            pytest.skip("It works with one rank only.")
        try:
            found = run_ranks(2, train_on_ranks, self.spec, dict(self.options), os.getcwd())
        except RanksFailed as error:
            broken(TRAINING, f"on two ranks: {error}")
        problem = next((text for text in found if text), "")
        if problem and not (self.changes_training and "differs" in problem):
            broken(TRAINING, f"on two ranks: {problem}")

    def test_one_run_after_another(self) -> None:
        """One object works in several runs, and is torn down after a failed one too."""
        plugin = self.make()
        untouched = traces()
        train([plugin])  # its libraries may change the process on first use
        before = traces()
        found = left(lasting(untouched), lasting(before))
        if found:
            broken(CLEAN, f"after a run {found}")
        for how in ("a second run", "a run that failed", "a run after one that failed"):
            failure = how == "a run that failed"
            try:
                train([plugin], fails=failure)
            except ZeroDivisionError:
                if not failure:
                    raise
            except Exception as error:  # noqa: BLE001 - reported as it is
                broken(BALANCED, f"{how} with the same object raised {one_line(error)}")
            found = left(before, traces())
            if found:
                broken(CLEAN, f"after {how} {found}")

    def test_tear_down_gives_back_what_launch_took(self) -> None:
        """on_teardown undoes on_launch."""
        plugin = self.make()
        for time in ("first", "second"):
            before = traces()
            context = _context(_bound(plugin, _Called("collective_barrier")))
            try:
                _told(plugin, "on_launch", context=context)
                _told(plugin, "on_teardown")
            except Exception as error:  # noqa: BLE001 - reported as it is
                broken(BALANCED, f"the {time} launch and tear-down of one object raised {one_line(error)}")
            found = left(before, traces())
            if found:
                broken(BALANCED, f"after the {time} launch and tear-down {found}")

    def test_two_objects_do_not_meddle(self) -> None:
        """Two objects in one run do not change the weights, unless they write the same files."""
        pair = [self.make(), self.make()]
        distinguish(pair)
        plain, watched = train([]), train(pair)
        differs = states.difference(plain, watched)
        if differs and not self.changes_training:
            broken(TRAINING, f"with two objects of it: {differs}")

    def test_a_script_may_save_the_object(self) -> None:
        """An object with a state_dict() can be part of the state that a script saves."""
        plugin = self.make()
        if not (hasattr(plugin, "state_dict") and hasattr(plugin, "load_state_dict")):
            pytest.skip("It has no state_dict() and load_state_dict().")
        train([plugin])
        state = plugin.state_dict()
        fresh = self.make()
        try:
            fresh.load_state_dict(state)
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(OBJECT, f"load_state_dict() of the result of state_dict() raised {one_line(error)}")
        differs = states.difference(state, fresh.state_dict())
        if differs:
            broken(OBJECT, f"a new object, after load_state_dict(): {differs}")


class _Result:
    """The result of a hook: an object that accepts any attribute."""


class _Called:
    """The provider of one hook, which records its calls."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[dict[str, Any]] = []
        self.raises: BaseException | None = None
        self.entered = self.left = 0
        returns = str(inspect.signature(_spec_of(name)).return_annotation)
        self.is_context = "ContextManager" in returns
        self.result = _result(returns)

    def call(self, **arguments: Any) -> Any:
        self.calls.append(arguments)
        if self.raises is not None:
            raise self.raises
        return self._context() if self.is_context else self.result

    @contextmanager
    def _context(self) -> Iterator[Any]:
        self.entered += 1
        try:
            yield self.result
        finally:
            self.left += 1


def _result(returns: str) -> Any:
    """Return a possible result of a hook with this return type."""
    if returns == "None":
        return None
    if returns.startswith("tuple["):
        return (0, 1) if "int" in returns else (_Result(), [])
    plain: dict[str, Any] = {"dict": {}, "Sequence": [], "list": [], "bool": True, "int": 3, "str": "text"}
    plain |= {"Tensor": torch.arange(3.0), "torch.Tensor": torch.arange(3.0)}
    return next((value for start, value in plain.items() if returns.startswith(start)), _Result())


def _is_what_was_given(result: Any, given: Any) -> bool:
    if isinstance(given, tuple) and isinstance(result, tuple):  # a wrapper may unpack it
        return len(result) == len(given) and all(a is b for a, b in zip(result, given, strict=True))
    return result is given


def _marks(plugin: Any) -> dict[str, dict[str, Any]]:
    """Return the options of ``@hookimpl`` by marked method."""
    found = {name: getattr(getattr(type(plugin), name, None), f"{PROJECT}_impl", None) for name in dir(type(plugin))}
    return {name: marks for name, marks in found.items() if isinstance(marks, dict)}


def _all_hooks() -> list[str]:
    return [name for kind in KINDS.values() for name in kind.hooks]


def _spec_of(name: str) -> Any:
    return next(getattr(kind.spec, name) for kind in KINDS.values() if name in kind.hooks)


def _parameters(name: str) -> list[str]:
    return [parameter for parameter in inspect.signature(_spec_of(name)).parameters if parameter != "self"]


def _arguments(name: str) -> dict[str, Any]:
    """Return arguments for a hook, of plain types where a wrapper may read them."""
    known: dict[str, Any] = {
        "loss": torch.tensor(1.0),
        "tensor": torch.arange(3.0),
        "path": "a path",
        "op": "sum",
        "step": lambda: None,
        "iterator": iter([1, 2]),
        "metrics": {"loss": 1.0},
        "kwargs": {},
        "args": (),
        "state": {},
        "info": {},
        "wait": True,
        "lazy": False,
        "trusted": False,
        "enabled": True,
        "module": torch.nn.Linear(1, 1),
        "optimizers": [],
        "parameters": [],
        "max_norm": 1.0,
        "norm_type": 2.0,
        "error_if_nonfinite": True,
        "sharded": False,
        "device": torch.device("cpu"),
    }
    return {parameter: known.get(parameter) for parameter in _parameters(name)}


def _bound(plugin: Any, called: _Called) -> Any:
    """Return the hooks of recording providers, wrapped by the extension."""
    binding = Binding()
    for kind in KINDS.values():
        if kind.name != "extension":
            provider = _provider(kind.name, called)
            binding.add(_choice(kind.name, provider), provider)
    binding.add(_choice("extension", plugin), plugin)
    return binding.bind()


def _provider(kind: str, called: _Called) -> Any:
    """Return a plugin object that records the calls of one hook."""
    parent = getattr(base, kind.capitalize())
    marked = [name for name in KINDS[kind].hooks if hasattr(getattr(parent, name), f"{PROJECT}_impl")]
    own = [name for name in KINDS[kind].hooks if name not in marked or name == called.name]
    return type(f"Noted{kind.capitalize()}", (parent,), {name: hookimpl(_method(name, called)) for name in own})()


def _method(name: str, called: _Called) -> Any:
    """Return a method with the arguments of a hook, which pluggy reads from its code."""

    def note(**arguments: Any) -> Any:
        return called.call(**arguments) if name == called.name else None

    parameters = _parameters(name)
    given = ", ".join(f"{parameter}={parameter}" for parameter in parameters)
    return eval(f"lambda {', '.join(['self', *parameters])}: note({given})", {"note": note, "__name__": __name__})


def _choice(kind: str, plugin: Any) -> Choice:
    name = type(plugin).__name__
    return Choice(kind=kind, name=name, reason="", descriptor=Plugin(factory=f"noted:{name}"), instance=plugin)


def _context(hooks: Any) -> Context:
    return Context(world=World(), device=torch.device("cpu"), hooks=hooks, names={})


def _told(plugin: Any, name: str, **arguments: Any) -> None:
    """Call a notification as pluggy does, if the extension implements it."""
    method = getattr(plugin, name, None)
    if method is not None:
        wanted = inspect.signature(method).parameters
        method(**{key: value for key, value in arguments.items() if key in wanted})


def _entered(result: Any, raised: BaseException | None = None) -> Any:
    """Enter and exit a context, raising `raised` in it if given; return any other value."""
    if not isinstance(result, AbstractContextManager):
        return result
    with result as entered:
        if raised is not None:
            raise raised
    return entered
