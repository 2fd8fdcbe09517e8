"""The session of a running job: set up its plugins in order, and tear them down in reverse."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from plugframe.core.planning.plan import Choice, Plan
from plugframe.core.registry.catalogue import Catalogue
from plugframe.core.runtime.binding import Binding, BoundHooks
from plugframe.errors import OrderError
from plugframe.hooks.context import Context
from plugframe.hooks.descriptor import Plugin
from plugframe.hooks.kinds import KINDS, SETUP_ORDER
from plugframe.hooks.variables import TRACE
from plugframe.hooks.world import World

#: Prepares a rank before the plugin of a kind is set up, and returns the context for it and those after it.
Prepare = Callable[[Context, BoundHooks, ExitStack], Context]


class Session:
    """The plugins of one `Lite`, from construction to tear-down.

    Args:
        before: called before the plugin of a kind is set up.

    Attributes:
        plan: the resolved plan.
        hooks: all hooks, bound.
        plugins: the plugin object of each singular kind.
        members: every plugin in use with its choice, loggers, extensions and callbacks included.
        extensions: the extensions by name, bare and qualified; the first of those with equal names.
        context: the context passed to plugins; None until `start`.
        deprecations: one sentence for each deprecated feature that a plugin uses.
    """

    def __init__(
        self, plan: Plan, catalogue: Catalogue, callbacks: list[Any], before: Mapping[str, Prepare] | None = None
    ) -> None:
        self.plan = plan
        self._before = before or {}
        self.plugins: dict[str, Any] = {}
        self.members: list[tuple[Choice, Any]] = []
        self.context: Context | None = None
        self._process = os.getpid()
        self._error: BaseException | None = None
        self._undo = ExitStack()
        self._adopted: dict[int, tuple[weakref.ref[Any], Callable[[Any], Any]]] = {}
        self._numbers = itertools.count()
        self._binding = Binding(trace=os.environ.get(TRACE) == "1")
        for choice in plan.choices.values():
            self.plugins[choice.kind] = self._add(choice, catalogue)
        self.loggers = [self._add(choice, catalogue) for choice in plan.loggers]
        # Reversed: pluggy runs the last registered wrapper outermost, and the first listed must be.
        added = [(choice, self._add(choice, catalogue)) for choice in reversed(plan.extensions)]
        self.extensions = {name: plugin for choice, plugin in added for name in (choice.name, choice.qualified)}
        for callback in callbacks:
            if KINDS["extension"].provided_by(callback):
                self._join(_as_choice(callback), callback)
        self.hooks: BoundHooks = self._binding.bind()
        self.deprecations = tuple(dict.fromkeys(self._binding.deprecations))

    def _add(self, choice: Choice, catalogue: Catalogue) -> Any:
        plugin = choice.make(catalogue)
        self._join(choice, plugin)
        return plugin

    def _join(self, choice: Choice, plugin: Any) -> None:
        self._binding.add(choice, plugin)
        self.members.append((choice, plugin))

    @property
    def world(self) -> World:
        """The world of this process, of size 1 until the job's processes exist."""
        return self.plan.world or World()

    @property
    def device(self) -> Any:
        """This rank's ``torch.device``."""
        index = self.plan.devices[self.world.local_rank]
        return self.hooks.accelerator_device(index=index)

    def start(self) -> Context:
        """Set up every plugin on this rank; tear down again on failure."""
        if self.context is not None:
            return self.context
        self._process = os.getpid()
        context = self._context()
        try:
            for kind in SETUP_ORDER:
                setup = getattr(self.hooks, f"{kind}_setup")
                if setup is None:  # of a kind of many, none is in use
                    continue
                if kind in self._before:
                    context = self._before[kind](context, self.hooks, self._undo)
                # Undone even if the set-up itself fails half-way.
                self._undo.callback(self._tear_down, kind)
                setup(context=context)
                if kind == "collective":
                    self._connect(context)
            self.context = context
            if self.hooks.on_launch is not None:
                self.hooks.on_launch(context=context)
        except BaseException as error:
            self.context, self._error = None, error
            self._undo.close()
            self._error = None
            raise
        return context

    def _tear_down(self, kind: str) -> None:
        """Call the tear-down hook of a kind; with the error that ends the job for loggers, which record it."""
        hook = getattr(self.hooks, f"{kind}_teardown")
        if hook is None:  # no plugin of a kind of many has one
            return
        if kind != "logger":
            hook()
            return
        try:
            hook(error=self._error)
        except BaseException:
            # pluggy stops at the first that raises. Tear-down may come twice: call each, so that all write their rows.
            with ExitStack() as each:
                for logger in self.loggers:
                    each.callback(self._binding.only(logger, "logger_teardown"), error=self._error)
            raise

    def _context(self) -> Context:
        return Context(
            world=self.world,
            device=self.device,
            hooks=self.hooks,
            names={kind: choice.name for kind, choice in self.plan.choices.items()},
            provides={kind: tuple(choice.descriptor.provides) for kind, choice in self.plan.choices.items()},
            timeout_s=self.plan.timeout_s,
            report_after_s=self.plan.report_after_s,
        )

    def _connect(self, context: Context) -> None:
        if self.hooks.on_disconnect is not None:
            self._undo.callback(self.hooks.on_disconnect)
        if self.hooks.on_connect is not None:
            self.hooks.on_connect(context=context)

    def on_close(self, undo: Any, *args: Any) -> None:
        """Register ``undo(*args)`` for tear-down, in last-in-first-out order."""
        self._undo.callback(undo, *args)

    def release_on_close(self, obj: Any, release: Callable[[Any], Any]) -> None:
        """Register ``release(obj)`` for tear-down, in last-in-first-out order, if `obj` is still alive.

        Only a weak reference is held: a script may set up a model for every fold, or a loader for every epoch.
        """
        adopted, number = self._adopted, next(self._numbers)
        adopted[number] = (weakref.ref(obj, lambda _: adopted.pop(number, None)), release)

    def close(self, error: BaseException | None = None) -> None:
        """Tear down in reverse order; continue after a failure. `error` is the exception that ends the job."""
        if self.context is None or os.getpid() != self._process:
            return  # a process that the script has forked must not end the job
        self._error = error
        try:
            if self.hooks.on_teardown is not None:
                self.hooks.on_teardown()
        finally:
            self.context = None
            for reference, release in list(self._adopted.values()):
                self._undo.callback(_release, reference, release)
            self._adopted.clear()
            self._undo.close()
            self._error = None  # its frames hold the user's objects

    def started(self) -> Context:
        """Return the context.

        Raises:
            OrderError: if the job is not running.
        """
        if self.context is None:
            raise OrderError("The job does not run: call lite.launch() first.")
        return self.context


def _release(reference: weakref.ref[Any], release: Callable[[Any], Any]) -> None:
    obj = reference()
    if obj is not None:
        release(obj)


def _as_choice(callback: Any) -> Choice:
    cls = type(callback)
    descriptor = Plugin(factory=f"{cls.__module__}:{cls.__qualname__}")
    return Choice(kind="extension", name=cls.__name__, reason="a callback", descriptor=descriptor, instance=callback)
