"""Candidates for a plan: plugins by name, plugin objects, or all that ``"auto"`` may pick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from plugframe.core.config.request import Setting
from plugframe.core.planning.plan import Choice
from plugframe.core.registry.catalogue import Catalogue
from plugframe.errors import PluginError, PluginLoadError, SettingError, article, shown
from plugframe.hooks.descriptor import Plugin
from plugframe.hooks.kinds import KINDS


def is_name(value: Any) -> bool:
    """Return whether a setting is the name of a plugin rather than an object."""
    return isinstance(value, (str, int))


@dataclass(frozen=True)
class Installed:
    """The installed plugins as choices.

    Attributes:
        catalogue: the registry.
        note: callback for a sentence about a skipped plugin or a setting without effect.
    """

    catalogue: Catalogue
    note: Callable[[str], object]

    def choose(self, kind: str, setting: Setting) -> Choice:
        """Return the choice for a setting that is a name or an object, with aliases resolved.

        Raises:
            UsageError: if no such plugin is installed or may be used, or the object is none.
            PluginLoadError: if its package is broken.
        """
        reason = f"asked for in {setting.source}"
        if not is_name(setting.value):
            return self._choose_object(kind, setting.value, reason)
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

    def _choose_object(self, kind: str, instance: Any, reason: str) -> Choice:
        """Return the choice for an object, with the published descriptor of its class, if there is one."""
        if isinstance(instance, type) or not KINDS[kind].provided_by(instance):
            hint = " No method of it is marked with @plugframe.hookimpl." if kind == "extension" else ""
            if isinstance(instance, type):
                hint = f" Pass an instance: {instance.__name__}()."
            raise SettingError(
                f"{kind}={shown(instance)} is neither the name of a plugin nor {article(kind)} object.{hint}"
            )
        cls = type(instance)
        own = getattr(cls, "plugin", None)
        name, entry = cls.__name__, None
        descriptor = own if isinstance(own, Plugin) else Plugin(factory=f"{cls.__module__}:{cls.__qualname__}")
        for each in self.catalogue.entries(kind):
            try:
                published = self.catalogue.describe(each)
            except PluginError:
                continue  # a broken package that is not in use
            if published.made(instance) and not published.preset:
                name, entry, descriptor = each.name, each, published
                break
        return Choice(kind=kind, name=name, reason=reason, descriptor=descriptor, entry=entry, instance=instance)

    def candidates(self, kind: str, *, by_name: bool = False) -> list[Choice]:
        """Return the candidates for ``"auto"``, by priority; note broken plugins and missing dependencies.

        Args:
            by_name: include those that are selected by name only; ``"auto"`` was not asked for.
        """
        found: list[Choice] = []
        for entry in self.catalogue.entries(kind):
            if self.catalogue.shadowed(entry):
                continue
            try:
                descriptor = self.catalogue.describe(entry)
                if (descriptor.priority is None and not by_name) or not descriptor.factory:
                    continue
                descriptor = descriptor.with_options({})
                absent = self.catalogue.absent(entry)
            except (PluginError, ValueError) as error:
                self.note(str(error))
                continue
            if absent:
                if not by_name:
                    self.note(f"{entry.origin} needs {absent}. It was skipped under {kind}='auto'.")
                continue
            reason = f"auto: priority {descriptor.priority}"
            found.append(Choice(kind=kind, name=entry.name, reason=reason, descriptor=descriptor, entry=entry))
        return sorted(found, key=lambda choice: -(choice.descriptor.priority or 0))

    def make(self, choice: Choice) -> Choice:
        """Return the choice with its plugin object, to query it about this machine."""
        return replace(choice, instance=choice.make(self.catalogue))

    def refused(self, kind: str) -> str:
        """Return a suffix for a message with the plugins of a kind that the policy refuses; empty if there are none."""
        told = [f"{entry.origin} is {why}." for entry, why in self.catalogue.refused(kind).items()]
        return "".join(f" {each}" for each in told[:3]) + (f" So are {len(told) - 3} more." if told[3:] else "")
