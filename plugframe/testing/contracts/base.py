"""The contract suite for all kinds: published, cheap to load, complete, and without shared state."""

from __future__ import annotations

import functools
import json
import pickle
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from plugframe.core.planning.plan import Choice
from plugframe.core.registry.registry import Entry, Registry
from plugframe.errors import MissingDependencyError, PlugframeError, PluginContractError, closest
from plugframe.hooks import API, KINDS, Plugin
from plugframe.testing.contracts.running import broken, one_line
from plugframe.testing.option_check import disagreements
from plugframe.utils.hook_check import check_hooks

PUBLISHED = "Published (an entry point in the group of the kind has the name)"
LIGHT = "Light (loading the descriptor imports neither torch nor anything the plugin requires)"
DESCRIBED = "Described (the descriptor has a summary of one line, and every field has its type)"
MADE = "Made (the factory is found, and can be called with the declared options only)"
COMPLETE = "Complete (every hook of the kind is implemented and marked, with the arguments of its specification)"
OPTIONS = "Options (the declared options are the parameters of the factory)"
ITSELF = "Itself (two plugin objects of one name share nothing)"
SENT = "Sent (an object that is not set up yet can be pickled: launch(function) sends it to the ranks)"
LAW_10 = "Law 10 (nothing is silently ignored)"

#: A script that loads one descriptor and prints the modules that this imported.
_LOAD = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[2])
before = set(sys.modules)
module, _, name = sys.argv[1].partition(":")
value = importlib.import_module(module)
for part in name.split("."):
    value = getattr(value, part)
print(json.dumps(sorted(set(sys.modules) - before)))
"""

_TEXTS = ("devices", "precisions", "provides", "tags", "requires", "variables")
_BY_KIND = ("needs", "prefers", "implies")


@pytest.mark.usefixtures("nothing_left_behind")
class PluginContract:
    """The tests that are the same for every kind; the suites of the kinds inherit them.

    Attributes:
        kind: of the plugin, set by the suite.
        spec: the name under test, ``"acme"``, or with its distribution, ``"acme-tools:acme"``.
        options: constructor arguments to test it with.
    """

    kind: ClassVar[str]
    spec: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}

    @functools.cached_property
    def registry(self) -> Registry:
        """The registry of the installed plugins."""
        return Registry.discover()

    @property
    def entry(self) -> Entry:
        """The entry point that publishes the plugin."""
        try:
            return self.registry.find(self.kind, self.spec)
        except PlugframeError as error:
            broken(PUBLISHED, f"{one_line(error)} Install the package first: pip install -e .")

    @property
    def descriptor(self) -> Plugin:
        """The plugin's descriptor."""
        entry = self.entry
        try:
            return self.registry.describe(entry)
        except PlugframeError as error:
            broken(DESCRIBED, one_line(error))

    def make(self, **options: Any) -> Any:
        """Return a new plugin object, with `options` in addition to those of the suite."""
        entry = self.entry
        try:
            return self.registry.make(entry, {**self.options, **options})
        except MissingDependencyError as error:
            pytest.skip(str(error))
        except PlugframeError as error:
            broken(MADE, one_line(error))

    # ------------------------------------------------------------------ descriptor and factory

    def test_the_descriptor_is_light(self) -> None:
        """Loading the descriptor imports neither torch nor the implementation."""
        entry, descriptor = self.entry, self.descriptor
        command = [sys.executable, "-c", _LOAD, entry.value, json.dumps(sys.path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            broken(LIGHT, f"{entry.value} does not load by itself: {last}")
        loaded = set(json.loads(done.stdout.splitlines()[-1]))
        factory = descriptor.factory.partition(":")[0]
        # A package that is required for its name alone is the plugin's own, and is imported to find the descriptor.
        own = entry.value.partition(":")[0].partition(".")[0]
        required = {name for name in descriptor.requires if name.partition(".")[0] != own}
        implementation = {factory} - {entry.value.partition(":")[0]}
        heavy = sorted({"torch", "numpy", *required, *implementation} & loaded)
        if heavy:
            broken(LIGHT, f"loading {entry.value} imports {', '.join(heavy)}: import it in the factory's module")
        if len(done.stdout.splitlines()) > 1 or done.stderr.strip():
            broken(LIGHT, f"loading {entry.value} prints: {(done.stderr or done.stdout).strip().splitlines()[0]}")

    def test_the_descriptor_describes_it(self) -> None:
        """The descriptor has a summary of one line, a supported API version, and fields of their types."""
        descriptor = self.descriptor
        if not descriptor.summary.strip() or "\n" in descriptor.summary:
            broken(DESCRIBED, f"summary={descriptor.summary!r} is not one line: listings show it")
        if descriptor.api not in (API, API - 1):
            broken(DESCRIBED, f"api={descriptor.api}, and this plugframe supports {API}")
        if not descriptor.factory:
            broken(DESCRIBED, f"{self.spec!r} is an alias of another name: set spec to that one")
        for field in _TEXTS:
            value = getattr(descriptor, field)
            if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
                broken(DESCRIBED, f"{field}={value!r} is not a tuple of strings: write ({value!r},) for one")
        for field in _BY_KIND:
            unknown = [kind for kind in getattr(descriptor, field) if kind not in KINDS]
            if unknown:
                broken(DESCRIBED, f"{field}= is by kind, and {unknown[0]!r} is none.{closest(unknown[0], KINDS)}")
        for field in ("needs", "prefers"):
            for kind, value in getattr(descriptor, field).items():
                if isinstance(value, str):
                    broken(DESCRIBED, f"{field}[{kind!r}]={value!r} is not a tuple of strings: write ({value!r},)")

    def test_every_hook_is_provided(self) -> None:
        """Every hook is implemented with the arguments of its specification; no other method is marked as one."""
        entry = self.entry
        choice = Choice(kind=self.kind, name=entry.name, reason="under test", descriptor=self.descriptor, entry=entry)
        try:
            deprecations = check_hooks(choice, self.make())
        except PluginContractError as error:
            broken(COMPLETE, str(error))
        if deprecations:
            broken(COMPLETE, deprecations[0])

    def test_nothing_else_looks_like_a_hook(self) -> None:
        """No method has the name prefix of hooks without being one: it would never be called."""
        hooks = KINDS[self.kind].hooks
        for name in dir(type(self.make())):
            if name.startswith(f"{self.kind}_") and name not in hooks:
                broken(COMPLETE, f"{name} is not a hook, and is named like one.{closest(name, hooks)}")

    def test_declared_options_are_what_it_takes(self) -> None:
        """Every declared option is a keyword of the factory, with the same default."""
        self.make()
        entry, descriptor = self.entry, self.descriptor
        found = disagreements(descriptor, self.registry.factory(entry))
        if found:
            broken(OPTIONS, f"{'; '.join(found)}")

    def test_an_unknown_option_is_refused(self) -> None:
        """An unknown keyword is an error."""
        self.make()
        try:
            self.registry.make(self.entry, {**self.options, "no_option_of_this_name": 1})
        except PlugframeError:
            return
        broken(LAW_10, "the factory silently accepts the unknown keyword no_option_of_this_name")

    def test_it_can_be_sent_to_the_ranks(self) -> None:
        """A plugin object can be pickled, to be sent to started processes."""
        plugin = self.make()
        try:
            copy = pickle.loads(pickle.dumps(plugin))
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(SENT, one_line(error))
        if type(copy) is not type(plugin):
            broken(SENT, f"a {type(plugin).__name__} arrives as a {type(copy).__name__}")

    def test_two_of_it_share_nothing(self) -> None:
        """Two plugin objects share no mutable value and are not equal: they are compared by identity."""
        first, second = self.make(), self.make()
        if first is second:
            broken(ITSELF, "the factory gives the same object each time")
        if first == second or type(first).__hash__ is None:
            broken(ITSELF, "its objects are compared by value: give its class eq=False")
        given = {id(value) for value in self.options.values()}
        for name, value in getattr(first, "__dict__", {}).items():
            changeable = isinstance(value, (dict, list, set, bytearray))
            if changeable and id(value) not in given and getattr(second, name, None) is value:
                broken(ITSELF, f"both hold one {type(value).__name__} in .{name}: make it in __init__")
        for cls in type(first).__mro__:
            for name, value in vars(cls).items():
                if isinstance(value, (dict, list, set)) and not name.startswith("__") and not name.isupper():
                    broken(ITSELF, f"{cls.__name__} holds a {type(value).__name__} in .{name}, which all share")
