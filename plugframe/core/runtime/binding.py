"""The hooks of a job: register the selected plugins with pluggy, validate them and bind the hooks."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import pluggy

from plugframe.core.planning.plan import Choice
from plugframe.errors import PluginContractError, SettingError, closest
from plugframe.hooks.calls import call_of
from plugframe.hooks.kinds import KINDS, Kind
from plugframe.hooks.markers import PROJECT, deprecated_uses, is_per_plugin, marks_of, since_of, substitute, unmarked_of


class BoundHooks:
    """The bound hooks by name.

    A provider hook that nothing wraps is the provider's own bound method: a plain call. A hook that is
    wrapped is pluggy's caller. A notification nobody listens to is None.
    """

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"There is no hook {name!r}; `plugframe.hooks` lists them.")


class Binding:
    """Holds the selected plugins and their hooks.

    Attributes:
        deprecations: what plugins implement that is on its way out, a sentence for each.
    """

    def __init__(self, *, trace: bool = False) -> None:
        self.deprecations: list[str] = []
        self._manager = pluggy.PluginManager(PROJECT)
        self._trace = trace
        self._providers: dict[str, tuple[Choice, Any]] = {}
        self._choices: dict[str, Choice] = {}
        self._defaults: dict[str, Any] = {}
        for kind in KINDS.values():
            self._manager.add_hookspecs(kind.spec)
        if trace:
            self._manager.add_hookcall_monitoring(_print_call, lambda *_: None)

    def add(self, choice: Choice, plugin: Any) -> None:
        """Register a plugin object.

        Raises:
            PluginContractError: if a hook of it does not exist, does not fit its specification, or is not marked.
            SettingError: if the very object is registered already.
        """
        origin = _origin(choice)
        if any(other is plugin for _, other in self._manager.list_name_plugin()):
            raise SettingError(f"{origin} is given twice: keep one.")
        # A plugin of a plural kind can wrap any hook.
        own = KINDS.values() if KINDS[choice.kind].many else (KINDS[choice.kind],)
        unmarked = ", ".join(unmarked_of(plugin, (name for kind in own for name in kind.hooks)))
        if unmarked:
            raise PluginContractError(f"{origin} overrides {unmarked} without a mark: add {_MARK}.")
        label = f"{choice.kind} {choice.name} #{len(self._choices)}"
        try:
            self._manager.register(plugin, name=label)
        except pluggy.PluginValidationError as error:
            reason = " ".join(str(error).split()).rstrip(".") + "."
            raise PluginContractError(f"{origin} breaks the plugin contract: {reason}{_fix(choice)}") from error
        except ValueError as error:
            # pluggy compares plugins with ==, so it rejects the second of two equal dataclass objects.
            raise PluginContractError(f"{origin} equals another plugin in use: give its class eq=False.") from error
        self._check_implementations(choice, plugin)
        self._choices[label] = choice
        if not KINDS[choice.kind].many:
            self._providers[choice.kind] = (choice, plugin)
            self._add_newer_hooks(KINDS[choice.kind], plugin, label)

    def _add_newer_hooks(self, kind: Kind, plugin: Any, label: str) -> None:
        """Register the defaults of hooks that are newer than a plugin."""
        lacking = [
            name for name in kind.hooks if since_of(getattr(kind.spec, name)) > 1 and marks_of(plugin, name) is None
        ]
        self._defaults[kind.name] = substitute(kind.spec, lacking)
        self._manager.register(self._defaults[kind.name], name=f"{label} defaults")

    def _check_implementations(self, choice: Choice, plugin: Any) -> None:
        origin = _origin(choice)
        fix = f"upgrade {choice.entry.distribution}, or report it to its author" if choice.entry else "fix its class"
        known = [name for kind in KINDS.values() for name in kind.hooks]
        for caller in self._manager.get_hookcallers(plugin) or ():
            if not caller.has_spec():
                raise PluginContractError(
                    f"{origin} implements {caller.name}, which is no hook.{closest(caller.name, known)}{_fix(choice)}"
                )
            for parameter in inspect.signature(getattr(plugin, caller.name)).parameters.values():
                if parameter.kind is parameter.KEYWORD_ONLY:
                    raise PluginContractError(
                        f"{origin} breaks the plugin contract: {caller.name} takes {parameter.name} by keyword only, "
                        "which would never be filled: leave out the '*' before it."
                    )
            uses = deprecated_uses(caller, plugin)
            self.deprecations += [f"{origin} {use} To avoid this, {fix}." for use in uses]

    def bind(self) -> BoundHooks:
        """Check that every provider hook has exactly one provider, and return the bound hooks.

        Raises:
            PluginContractError: naming the plugin, the hook and what to write.
        """
        bound = BoundHooks()
        for kind in KINDS.values():
            for name in kind.hooks:
                if is_per_plugin(getattr(kind.spec, name)):
                    _, plugin = self._providers.get(kind.name, (None, None))
                    setattr(bound, name, getattr(plugin, name, None))
                elif kind.many:
                    caller = getattr(self._manager.hook, name)
                    setattr(bound, name, self._call(caller) if caller.get_hookimpls() else None)
                elif kind.name in self._providers:
                    self._bind_provider(bound, kind, name)
                else:
                    self._check_unused(kind, name)
        return bound

    def only(self, plugin: Any, name: str) -> Any:
        """Return a hook with the implementation of one plugin."""
        others = [other for _, other in self._manager.list_name_plugin() if other is not plugin]
        return self._manager.subset_hook_caller(name, remove_plugins=others)

    def _bind_provider(self, bound: BoundHooks, kind: Kind, name: str) -> None:
        choice, plugin = self._providers[kind.name]
        caller = getattr(self._manager.hook, name)
        impls = caller.get_hookimpls()
        plain = [impl for impl in impls if not (impl.wrapper or impl.hookwrapper)]
        for impl in plain:
            if impl.plugin is not plugin and impl.plugin is not self._defaults[kind.name]:
                raise PluginContractError(
                    f"{_origin(self._choices[impl.plugin_name])} implements {name}, which {_origin(choice)} provides: "
                    f"mark it with {_MARK}(wrapper=True) to wrap the provider."
                )
        if not plain:
            raise PluginContractError(
                f"{_origin(choice)} does not provide the hook {name}: implement it and mark it with {_MARK}."
            )
        # An implementation that omits arguments is called through pluggy, which passes only those it takes.
        whole = set(plain[0].argnames + plain[0].kwargnames) == set(caller.spec.argnames + caller.spec.kwargnames)
        alone = whole and len(impls) == 1 and not self._trace
        setattr(bound, name, getattr(plain[0].plugin, name) if alone else self._call(caller))

    def _call(self, caller: Any) -> Any:
        return caller if self._trace else call_of(caller)

    def _check_unused(self, kind: Kind, name: str) -> None:
        for impl in getattr(self._manager.hook, name).get_hookimpls():
            raise PluginContractError(
                f"{_origin(self._choices[impl.plugin_name])} implements {name}, and no {kind.name} takes part in a "
                "running job: it would never be called. Leave it out."
            )


_MARK = "@plugframe.hookimpl"


def _origin(choice: Choice) -> str:
    return choice.entry.origin if choice.entry else f"{choice.kind} object {choice.name}"


def _fix(choice: Choice) -> str:
    return f" Fix, upgrade or uninstall {choice.entry.distribution}." if choice.entry else ""


def _print_call(hook_name: str, hook_impls: Any, kwargs: Mapping[str, Any]) -> None:
    arguments = ", ".join(f"{key}={_short(value)}" for key, value in kwargs.items())
    print(f"plugframe: {hook_name}({arguments})", file=sys.stderr)


def _short(value: Any) -> str:
    if isinstance(value, (int, float, bool)):
        return str(value)
    shape = getattr(value, "shape", None)
    return type(value).__name__ + ("" if shape is None else str(tuple(shape)))
