"""Callbacks: objects whose ``on_…`` methods are called by `Lite.call` and by plugframe itself."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from plugframe.errors import SettingError
from plugframe.hooks import hookimpl
from plugframe.hooks.kinds import KINDS
from plugframe.hooks.markers import marks_of
from plugframe.utils.logging import failing, warn_caller

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite

#: Fabric's names of moments, and the notification that is the same moment.
_FABRIC = {"on_setup": "on_after_setup", "on_optimizer_step": "on_after_optimizer_step"}
#: Packages whose callback classes have methods for a trainer.
_TRAINERS = ("lightning", "pytorch_lightning", "lightning_fabric", "plugframe")


class Callbacks:
    """The callbacks of one `Lite`, in the order they were passed."""

    def __init__(self, lite: Lite, callbacks: list[Any]) -> None:
        self._lite = weakref.ref(lite)
        self._callbacks = callbacks
        self._called: set[tuple[int, str]] = set()
        self._warned = False

    def listener(self) -> object | None:
        """Return a plugin that calls the methods that plugframe calls by itself; None if there are none.

        Raises:
            SettingError: if a method takes an argument that it does not get.
        """
        wanted = {name for callback in self._callbacks for name in _methods(callback)}
        if not wanted:
            return None
        namespace = {name: hookimpl(make(self)) for name, make in _LISTENERS.items() if self._listens(name)}
        namespace["on_teardown"] = hookimpl(_LISTENERS["on_teardown"](self))
        made: object = type("Callbacks", (), {name: staticmethod(each) for name, each in namespace.items()})()
        return made

    def _listens(self, hook: str) -> bool:
        heard = False
        for callback in self._callbacks:
            for name in _names(callback, hook):
                _check_parameters(callback, name, _PASSED[hook])
                heard = True
        return heard

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call the methods for a notification."""
        lite = self._lite()
        if lite is None:
            return
        arguments |= {"lite": lite, "fabric": lite}
        if hook == "on_optimizer_step":
            arguments["strategy"] = lite.strategy
        for callback in self._callbacks:
            for name in _names(callback, hook):
                self._called.add((id(callback), name))
                _call(getattr(callback, name), (), arguments)

    def call(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Call a method of every callback that has it; see `Lite.call`."""
        for callback in self._callbacks:
            method = getattr(callback, name, None)
            if method is None:
                continue
            if not callable(method):
                raise SettingError(f"{type(callback).__name__}.{name} is no method: call() cannot call it.")
            if not self._warned and any(name in _names(callback, hook) for hook in _PASSED):
                self._warned = True
                warn_caller(
                    f"plugframe calls {type(callback).__name__}.{name}() by itself, and lite.call({name!r}) calls it "
                    "once more: leave the call out, or rename the method."
                )
            self._called.add((id(callback), name))
            _call(method, args, kwargs)

    def warn_of_uncalled(self) -> None:
        """Warn of ``on_…`` methods that nothing has called, at the end of a job that did not fail."""
        lite = self._lite()
        if failing() or lite is None or not lite.is_global_zero:
            return
        for callback in self._callbacks:
            names = [name for name in _methods(callback) if (id(callback), name) not in self._called]
            if names:
                shown = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
                warn_caller(
                    f"{type(callback).__name__} has {shown}, which nothing has called: call it with "
                    f"lite.call({names[0]!r}), or use a name that plugframe calls: {', '.join(_known())}."
                )


def _known() -> list[str]:
    return sorted({*_PASSED, *_FABRIC.values()})


def _names(callback: Any, hook: str) -> list[str]:
    """Return the methods of a callback that are called at a notification."""
    names = [hook, _FABRIC[hook]] if hook in _FABRIC else [hook]
    # pluggy calls methods that are marked.
    return [name for name in names if callable(getattr(callback, name, None)) and marks_of(callback, name) is None]


def _methods(callback: Any) -> list[str]:
    """Return the unmarked ``on_…`` methods of the classes of a callback that the user has written."""
    classes = [each for each in type(callback).__mro__ if each.__module__.partition(".")[0] not in _TRAINERS]
    names = dict.fromkeys(name for each in classes for name in vars(each) if name.startswith("on_"))
    return [name for name in names if callable(getattr(callback, name)) and marks_of(callback, name) is None]


def _check_parameters(callback: Any, name: str, passed: tuple[str, ...]) -> None:
    known = (*passed, "lite", "fabric", *(("strategy",) if "optimizer" in passed else ()))
    for parameter in _parameters(getattr(callback, name)):
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if not optional and parameter.name not in known:
            raise SettingError(
                f"{type(callback).__name__}.{name}() takes {parameter.name!r}, and plugframe calls it with "
                f"{', '.join(known)}: take some of them, or rename the method and call it with lite.call()."
            )


def _parameters(method: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(method).parameters.values())
    except (TypeError, ValueError):
        return [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]


def _call(method: Callable[..., Any], args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    """Call a method with those of the keyword arguments that it takes."""
    parameters = _parameters(method)
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        taken = {each.name for each in parameters if each.kind is not each.POSITIONAL_ONLY}
        kwargs = {name: value for name, value in kwargs.items() if name in taken}
    method(*args, **kwargs)


# pluggy passes what a function names.
def _on_launch(own: Callbacks) -> Any:
    return lambda context: own.notify("on_launch", context=context)


def _on_setup(own: Callbacks) -> Any:
    return lambda module: own.notify("on_setup", module=module)


def _on_backward(own: Callbacks) -> Any:
    return lambda loss: own.notify("on_backward", loss=loss)


def _on_optimizer_step(own: Callbacks) -> Any:
    return lambda optimizer: own.notify("on_optimizer_step", optimizer=optimizer)


def _on_save(own: Callbacks) -> Any:
    return lambda path, state: own.notify("on_save", path=path, state=state)


def _on_load(own: Callbacks) -> Any:
    return lambda path: own.notify("on_load", path=path)


def _on_teardown(own: Callbacks) -> Any:
    def listen() -> None:
        own.notify("on_teardown")
        own.warn_of_uncalled()

    return listen


_LISTENERS: dict[str, Callable[[Callbacks], Any]] = {
    "on_launch": _on_launch,
    "on_setup": _on_setup,
    "on_backward": _on_backward,
    "on_optimizer_step": _on_optimizer_step,
    "on_save": _on_save,
    "on_load": _on_load,
    "on_teardown": _on_teardown,
}
#: What each notification passes, as its specification says.
_PASSED = {name: tuple(inspect.signature(getattr(KINDS["extension"].spec, name)).parameters)[1:] for name in _LISTENERS}
