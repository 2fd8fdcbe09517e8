"""The user's module, whose call runs under precision and strategy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from plugframe.adopt.swap import KEY, adopt, release, state_of
from plugframe.errors import SettingError, UsageError, closest


class ModuleState:
    """What an adopted module knows.

    Attributes:
        original: the user's class.
        plain_call: calls the module as its own class does.
        engine: what the strategy keeps beside the module, called as ``engine(call, *args, **kwargs)``; or None.
        forward_methods: methods that run under the strategy.
        inside: whether a call is running under the strategy now, so that everything below runs as it is.
    """

    original: Any

    def __init__(self, hooks: Any, engine: Any, plain_call: Callable[..., Any], forward_methods: set[str]) -> None:
        self.hooks = hooks
        self.engine = engine
        self.plain_call = plain_call
        self.forward_methods = forward_methods
        self.inside = False

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``call(*args, **kwargs)`` under precision and strategy."""
        hooks = self.hooks
        self.inside = True
        try:
            args, kwargs = hooks.precision_convert_input(data=(args, kwargs))
            with hooks.precision_forward_context():
                engine = self.engine
                result = call(*args, **kwargs) if engine is None else engine(call, *args, **kwargs)
            return hooks.precision_convert_output(data=result)
        finally:
            self.inside = False

    def plain_dict(self, obj: Any) -> dict[str, Any]:
        """Return the attributes of the plain object."""
        return {key: value for key, value in obj.__dict__.items() if key != KEY}


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    state: ModuleState = self.__dict__[KEY]
    if state.inside:
        return state.original.__call__(self, *args, **kwargs)
    return state.run(state.plain_call, args, kwargs)


def _mark_forward_method(self: Any, method: str | Callable[..., Any]) -> None:
    """Let `method` run under the strategy from now on, as calling the module does.

    Raises:
        SettingError: if the module has no such method.
    """
    state: ModuleState = self.__dict__[KEY]
    state.forward_methods.add(checked_name(self, method))


def _itself(self: Any) -> Any:
    """The module itself: there is nothing to unwrap."""
    return self


def adopt_module(module: nn.Module, *, hooks: Any, engine: Any, forward_methods: tuple[Any, ...]) -> None:
    """Adopt `module` in place."""
    names = {checked_name(module, method) for method in forward_methods}
    namespace: dict[str, Any] = {name: _guarded(name, fn) for name, fn in _own_methods(type(module)).items()}
    namespace.update(__call__=_call, mark_forward_method=_mark_forward_method)
    if not hasattr(module, "module"):
        namespace["module"] = property(_itself)
    plain_call = functools.partial(type(module).__call__, module)
    adopt(module, ModuleState(hooks, engine, plain_call, names | {"forward"}), namespace)


def release_module(module: nn.Module) -> None:
    """Give the module back as it was. The engine goes, and with it its gradient hooks."""
    release(module)


def checked_name(module: Any, method: str | Callable[..., Any]) -> str:
    """Return the name of one of the module's own methods.

    Raises:
        SettingError: if it has no such method, with the closest one.
    """
    name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    original = getattr(state_of(module), "original", type(module))
    methods = _own_methods(original)
    if name not in methods:
        raise SettingError(
            f"{original.__name__} has no method {name!r} to run under the strategy.{closest(name, methods)} "
            f"Methods: {', '.join(sorted(methods))}."
        )
    return name


def _own_methods(cls: type) -> dict[str, FunctionType]:
    """Return the public methods the user's classes add to ``nn.Module``, and ``forward``."""
    found: dict[str, FunctionType] = {}
    for klass in cls.__mro__:
        if klass in (nn.Module, object) or not issubclass(klass, nn.Module):
            continue
        for name, value in vars(klass).items():
            new = name == "forward" or not hasattr(nn.Module, name)
            if isinstance(value, FunctionType) and not name.startswith("_") and new:
                found.setdefault(name, value)
    return found


def _guarded(name: str, method: FunctionType) -> Callable[..., Any]:
    """Return `method` so that, called from outside, it runs under the strategy or is watched."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(KEY)
        if state is None or state.inside:
            return method(self, *args, **kwargs)
        if name in state.forward_methods:
            return state.run(functools.partial(method, self), args, kwargs)
        with _watched(self, name, state):
            return method(self, *args, **kwargs)

    return guarded


@contextmanager
def _watched(module: nn.Module, name: str, state: ModuleState) -> Iterator[None]:
    """Refuse a forward of a part with parameters: it would compute without precision and strategy."""
    parts = {id(part): path for path, part in module.named_modules() if part._parameters and part is not module}

    def refuse(part: nn.Module, _: Any) -> None:
        if id(part) in parts and not state.inside:
            what = f"{type(part).__name__} {parts[id(part)]!r}"
            raise UsageError(
                f"{type(module).__name__}.{name}() runs {what} outside of the strategy: set the model up with "
                f"forward_methods=({name!r},), or call model.mark_forward_method({name!r}) before."
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
