"""One pluggy manager per job: registers what was selected, checks it, and binds the hooks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import pluggy

from plugframe.errors import PluginContractError
from plugframe.hooks.kinds import KINDS, Kind
from plugframe.hooks.markers import PROJECT
from plugframe.plan import Choice


class BoundHooks:
    """Every hook by name.

    A provider hook that nothing wraps is the provider's own bound method: a plain call. A hook that is
    wrapped is pluggy's caller. A notification nobody listens to is None.
    """

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"There is no hook {name!r}; `plugframe.hooks` lists them.")


class Pipeline:
    """Holds the selected plugins and their hooks."""

    def __init__(self, *, trace: bool = False) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._trace = trace
        self._providers: dict[str, tuple[Choice, Any]] = {}
        for kind in KINDS.values():
            self._manager.add_hookspecs(kind.spec)
        if trace:
            self._manager.add_hookcall_monitoring(_print_call, lambda *_: None)

    def add(self, choice: Choice, plugin: Any) -> None:
        """Register a plugin object.

        Raises:
            PluginContractError: if a hook of it does not fit its specification.
        """
        label = f"{choice.kind} {choice.name} #{len(self._manager.get_plugins())}"
        try:
            self._manager.register(plugin, name=label)
        except pluggy.PluginValidationError as error:
            reason = str(error).replace("\n", " ")
            raise PluginContractError(f"{_origin(choice)} breaks the plugin contract: {reason}") from error
        if not KINDS[choice.kind].many:
            self._providers[choice.kind] = (choice, plugin)

    def bind(self) -> BoundHooks:
        """Check that every provider hook has its one provider, and return the hooks.

        Raises:
            PluginContractError: naming the plugin, the hook and what to write.
        """
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            owner = next((c for c, p in self._providers.values() if p is error.plugin), None)
            name = _origin(owner) if owner else type(error.plugin).__name__
            reason = str(error).splitlines()[0]
            raise PluginContractError(f"{name} implements a hook that does not exist: {reason}") from error
        bound = BoundHooks()
        for kind in KINDS.values():
            for name in _hooks_of(kind):
                if kind.many:
                    self._bind_many(bound, name)
                elif kind.name in self._providers:
                    self._bind_provider(bound, kind, name)
        return bound

    def _bind_many(self, bound: BoundHooks, name: str) -> None:
        caller = getattr(self._manager.hook, name)
        setattr(bound, name, caller if caller.get_hookimpls() else None)

    def _bind_provider(self, bound: BoundHooks, kind: Kind, name: str) -> None:
        choice, plugin = self._providers[kind.name]
        caller = getattr(self._manager.hook, name)
        impls = caller.get_hookimpls()
        plain = [impl for impl in impls if not (impl.wrapper or impl.hookwrapper)]
        for impl in plain:
            if impl.plugin is not plugin:
                raise PluginContractError(
                    f"{type(impl.plugin).__name__} implements {name}, which {_origin(choice)} provides: "
                    "mark it with @hookimpl(wrapper=True) to wrap the provider."
                )
        if not plain:
            overridden = callable(getattr(type(plugin), name, None))
            fix = "mark its method with @plugframe.hookimpl" if overridden else "implement it"
            raise PluginContractError(f"{_origin(choice)} does not provide the hook {name}: {fix}.")
        alone = len(impls) == 1 and not self._trace
        setattr(bound, name, getattr(plugin, name) if alone else caller)


def _hooks_of(kind: Kind) -> list[str]:
    return [name for name, value in vars(kind.spec).items() if hasattr(value, f"{PROJECT}_spec")]


def _origin(choice: Choice) -> str:
    return choice.entry.origin if choice.entry else f"{choice.kind} object {choice.name}"


def _print_call(hook_name: str, hook_impls: Any, kwargs: Mapping[str, Any]) -> None:
    arguments = ", ".join(f"{key}={_short(value)}" for key, value in kwargs.items())
    print(f"plugframe: {hook_name}({arguments})", file=sys.stderr)


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__}{tuple(shape)}"
    text = value if isinstance(value, (int, float, bool)) else type(value).__name__
    return str(text)
