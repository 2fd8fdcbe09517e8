"""What can be chosen from: what was asked for by name or as an object, and what ``"auto"`` may pick."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from plugframe.core.config.plugin_options import configure, configure_many
from plugframe.core.config.request import CODE, NAMES, Request, Setting, contradiction
from plugframe.core.planning.plan import Choice
from plugframe.core.planning.plugin_objects import by_kind, is_kind, kind_of, made_by
from plugframe.core.registry.registry import Entry, article
from plugframe.errors import PluginError, PluginLoadError, SettingError, UsageError
from plugframe.hooks.descriptor import Plugin


class Catalogue(Protocol):
    """What is needed of `plugframe.core.registry.registry.Registry`."""

    def entries(self, kind: str | None = None) -> list[Entry]: ...
    def names(self, kind: str) -> list[str]: ...
    def find(self, kind: str, name: str) -> Entry: ...
    def shadowed(self, entry: Entry) -> bool: ...
    def refused(self, kind: str | None = None) -> dict[Entry, str]: ...
    def describe(self, entry: Entry) -> Plugin: ...
    def absent(self, entry: Entry) -> str | None: ...
    def make(self, entry: Entry, options: Mapping[str, Any] | None = None) -> Any: ...


class Candidates:
    """The plugins one request can come to.

    Attributes:
        notes: what was passed over, and why.
    """

    def __init__(self, request: Request, catalogue: Catalogue) -> None:
        self.request = request
        self.catalogue = catalogue
        self.notes: list[str] = list(request.notes)
        self._instances = by_kind(request.value("plugins", ()))
        self._automatic: dict[str, list[Choice]] = {}
        self._implied: dict[str, Setting] = {}
        self._added: list[Setting] = []
        for kind in NAMES:
            objects = [Setting(each, f"plugins= in {CODE}") for each in self._instances.get(kind, ())]
            for setting in (request.get(kind), request.overridden.get(kind), *objects):
                if setting is not None:
                    self._imply(kind, setting)

    def _imply(self, kind: str, setting: Setting) -> None:
        """Take note of what a name, or an object's class, says about other kinds: of the launcher, say."""
        asked = f"{kind}={_shown(setting.value)}"
        if _is_name(setting.value):
            entry = self.catalogue.find(kind, str(setting.value))
            origin, descriptor = entry.origin, self.catalogue.describe(entry)
        else:
            choice = self._object(kind, setting.value, "")
            origin, descriptor = choice.origin, choice.descriptor
        for other, value in descriptor.implies.items():
            if other == "extension":
                self._added.append(Setting(value, f"{asked}, which adds it"))
                continue
            if other not in NAMES:
                raise PluginLoadError(f"{origin} is broken: implies={{{other!r}: …}} names no kind of plugin.")
            implied = Setting(value, f"{asked}, which stands for {other}={value!r}")
            own = [Setting(each, f"plugins= in {CODE}") for each in self._instances.get(other, ())]
            rival = self.request.get(other) or self._implied.get(other) or next(iter(own), None)
            if rival and self.given(other, rival).qualified != self.given(other, implied).qualified:
                raise contradiction(other, rival, implied)
            if not own:
                self._implied[other] = implied

    # ------------------------------------------------------------------ what was asked for

    def asked(self, kind: str) -> Choice | None:
        """Return what was asked for of this kind, None for ``"auto"``.

        Raises:
            UsageError: if it is not installed, or was asked for twice in two ways.
        """
        setting = self.request.get(kind) or self._implied.get(kind)
        own = self._instances.get(kind)
        if own and setting:
            raise SettingError(
                f"{kind} is given twice: as {_shown(setting.value)} in {setting.source}, and in plugins=. Keep one."
            )
        if own:
            return self.given(kind, Setting(own[0], f"plugins= in {CODE}"))
        if setting is None:
            return None
        choice = self.given(kind, setting)
        other = self.request.overridden.get(kind)
        if other is None:
            return choice
        agreed = _agreed(choice, self.given(kind, other))
        if agreed is None:
            raise contradiction(kind, setting, other)
        return agreed

    def given(self, kind: str, setting: Setting) -> Choice:
        """Return the choice for one setting: a name or an object."""
        reason = f"asked for in {setting.source}"
        if not _is_name(setting.value):
            return self._object(kind, setting.value, reason)
        entry = self.catalogue.find(kind, str(setting.value))
        descriptor = self.catalogue.describe(entry)
        if descriptor.alias_of:
            alias, reason = entry, f"{str(setting.value)!r} stands for it, {reason}"
            entry = self.catalogue.find(kind, descriptor.alias_of)
            descriptor = self.catalogue.describe(entry)
            if descriptor.alias_of:
                raise PluginLoadError(f"{alias.origin} is broken: it stands for {entry.name!r}, which is an alias too.")
        if descriptor.best_of and kind != "accelerator":
            raise PluginLoadError(f"{entry.origin} is broken: best_of= is for accelerators.")
        return Choice(kind=kind, name=entry.name, reason=reason, descriptor=descriptor, entry=entry)

    def _object(self, kind: str, instance: Any, reason: str) -> Choice:
        """Return the choice for an object, with the descriptor its class is published under, if it is."""
        if isinstance(instance, type) or not is_kind(instance, kind):
            hint = " No method of it is marked with @plugframe.hookimpl." if kind == "extension" else ""
            if isinstance(instance, type):
                hint = f" Pass an instance: {instance.__name__}()."
            raise SettingError(
                f"{kind}={_shown(instance)} is neither the name of a plugin nor {article(kind)} object.{hint}"
            )
        for entry in self.catalogue.entries(kind):
            try:
                descriptor = self.catalogue.describe(entry)
            except PluginError:
                continue  # somebody else's broken package
            if made_by(instance, descriptor.factory) and not descriptor.preset:
                return Choice(
                    kind=kind, name=entry.name, reason=reason, descriptor=descriptor, entry=entry, instance=instance
                )
        cls = type(instance)
        own = getattr(cls, "plugin", None)
        descriptor = own if isinstance(own, Plugin) else Plugin(factory=f"{cls.__module__}:{cls.__qualname__}")
        return Choice(kind=kind, name=cls.__name__, reason=reason, descriptor=descriptor, instance=instance)

    def listed(self, kind: str, field: str) -> tuple[Choice, ...]:
        """Return the choices for a setting that takes any number of names and objects."""
        setting, other = self.request.get(field), self.request.overridden.get(field)
        choices, rivals = self._listed(kind, setting), self._listed(kind, other)
        if setting and other and choices and [c.qualified for c in choices] != [c.qualified for c in rivals]:
            raise contradiction(field, setting, other)
        apart = [Setting(instance, f"plugins= in {CODE}") for instance in self._instances.get(kind, ())]
        found = [*(choices or rivals), *(self.given(kind, each) for each in apart)]
        there = {choice.qualified for choice in found}
        added = [self.given(kind, each) for each in self._added if kind == "extension"]
        missing = {choice.qualified: choice for choice in added if choice.qualified not in there}
        return (*found, *missing.values())

    def _listed(self, kind: str, setting: Setting | None) -> list[Choice]:
        if setting is None:
            return []
        values = setting.value if isinstance(setting.value, (list, tuple)) else (setting.value,)
        if kind == "extension":
            # `plugins` takes objects of any kind; the others are chosen with their kind.
            values = [value for value in values if isinstance(value, str) or kind_of(value) == "extension"]
        choices = [self.given(kind, Setting(value, setting.source)) for value in values]
        named = [choice.qualified for choice in choices if choice.instance is None]
        for choice in choices:
            if choice.instance is None and named.count(choice.qualified) > 1:
                raise SettingError(f"{kind} {choice.name!r} is given twice in {setting.source}: keep one.")
        return choices

    # ------------------------------------------------------------------ what "auto" may pick

    def automatic(self, kind: str) -> list[Choice]:
        """Return what ``"auto"`` may pick, the most eager first. A broken plugin is a note, not the end."""
        if kind in self._automatic:
            return self._automatic[kind]
        found: list[Choice] = []
        for entry in self.catalogue.entries(kind):
            if self.catalogue.shadowed(entry):
                continue
            try:
                descriptor = self.catalogue.describe(entry)
                if descriptor.priority is None or not descriptor.factory:
                    continue
                absent = self.catalogue.absent(entry)
            except PluginError as error:
                self.pass_over(str(error))
                continue
            if absent:
                self.pass_over(f"{entry.origin} needs {absent}. It was passed over under {kind}='auto'.")
                continue
            reason = f"auto: priority {descriptor.priority}"
            found.append(Choice(kind=kind, name=entry.name, reason=reason, descriptor=descriptor, entry=entry))
        self._automatic[kind] = sorted(found, key=lambda choice: -(choice.descriptor.priority or 0))
        return self._automatic[kind]

    def pass_over(self, why: str) -> None:
        """Keep why something installed was not considered."""
        if why not in self.notes:
            self.notes.append(why)

    def refused(self, kind: str) -> str:
        """Return what is installed of a kind and must not be used, to follow a message; empty if nothing is."""
        told = [f"{entry.origin} is {why}." for entry, why in self.catalogue.refused(kind).items()]
        return "".join(f" {each}" for each in told[:3]) + (f" So are {len(told) - 3} more." if told[3:] else "")

    def made(self, choice: Choice) -> Choice:
        """Return the choice with its object made, to ask it about this machine."""
        if choice.instance is not None:
            return choice
        assert choice.entry is not None
        return replace(choice, instance=self.catalogue.make(choice.entry, choice.arguments))

    # ------------------------------------------------------------------ with the options that were given

    def configured(self, choice: Choice) -> Choice:
        """Return the final choice of a kind with its options; only an object of the user's is made already.

        Raises:
            SettingError: for a wrong option.
        """
        given = [each for each in self.request.options if each.kind == choice.kind]

        def same(name: str) -> bool:
            try:
                return self.given(choice.kind, Setting(name, "")).qualified == choice.qualified
            except UsageError:
                return False  # not installed, and not asked for either: something stronger was

        return configure(choice, given, same=same, note=self.pass_over) if given else choice

    def configured_many(self, choices: Iterable[Choice], kind: str) -> tuple[Choice, ...]:
        """Return all choices of a kind with their options."""
        given = [each for each in self.request.options if each.kind == kind]
        return tuple(configure_many(tuple(choices), given, self.pass_over) if given else choices)

    def settled(self, choice: Choice, tried: Choice) -> Choice:
        """Return the final choice made and with its options; `tried` is the same, made without."""
        choice = self.configured(choice)
        return self.made(choice) if choice.options else replace(choice, instance=tried.instance)


def _is_name(value: Any) -> bool:
    return isinstance(value, (str, int))


def _shown(value: Any) -> str:
    """Return the text of a value in a message, which is one line: an object by its class."""
    if isinstance(value, (str, int, float, list, tuple)):
        return repr(value)
    return value.__name__ if isinstance(value, type) else type(value).__name__


def _agreed(first: Choice, second: Choice) -> Choice | None:
    """Return what two settings of one kind come to, None if they contradict each other."""
    if first.qualified == second.qualified or second.descriptor.best_of in first.descriptor.tags:
        return first
    return second if first.descriptor.best_of in second.descriptor.tags else None
