"""Adopt a module in place: its calls run under precision and strategy."""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn.modules.module import register_module_forward_pre_hook

from plugframe.adopt.job_state import JobState
from plugframe.adopt.optimizer import is_default, make_zero_grad, owns_gradients
from plugframe.adopt.parts import runs_parts
from plugframe.base.precision import Precision
from plugframe.errors import SettingError, UsageError, closest
from plugframe.utils.swap import KEY, State, adopt, plain_class, release

#: Prefix of the keys in the state of a module returned by ``torch.compile(module)``.
COMPILED = "_orig_mod."


class ModuleState(State):
    """State of an adopted module.

    Attributes:
        engine: the strategy's object for the module, called as ``engine(call, *args, **kwargs)``; or None.
        forward_methods: names of the methods that run under the strategy.
        inside: whether a call is running under the strategy; calls inside of it run unchanged.
        running: of other methods that were called, whether they run submodules, and so run under the strategy too.
        free: whether methods may run submodules as they like: one rank, and a precision and a strategy that do nothing.
        plain_values: attributes of the module that have other values in a copy of it.
        on_first_call: called before the first call in this process; None after it.
    """

    def __init__(self, hooks: Any, engine: Any, job: JobState, forward_methods: set[str]) -> None:
        self.hooks = hooks
        self.engine = engine
        self.job = job
        self.weights = job.weights
        self.forward_methods = forward_methods
        self.inside = False
        self.running: dict[str, bool] = {}
        self.plain_values: dict[str, Any] = {}
        self.on_first_call: Callable[[], None] | None = None
        # None where the precision does nothing: saves up to three calls per forward.
        self._convert_input = _overridden(hooks, "precision_convert_input")
        self._convert_output = _overridden(hooks, "precision_convert_output")
        self._context = _overridden(hooks, "precision_forward_context")
        nothing = self._context is None and self._convert_input is None and self._convert_output is None
        self.free = nothing and engine is None and job.alone

    def runs(self, module: nn.Module, name: str) -> bool:
        """Return whether a method runs under the strategy: it was named, or its source says that it runs submodules."""
        if name in self.forward_methods:
            return True
        if name not in self.running:
            self.running[name] = runs_parts(module, name)
        return self.running[name]

    def plain_dict(self, obj: Any) -> dict[str, Any]:
        """Return the attributes of the plain module."""
        return {**super().plain_dict(obj), **self.plain_values}

    def record_call(self, training: bool) -> None:
        """Record whether the script trains or evaluates, from which the purpose of a pass over a loader is derived."""
        weights = self.weights
        weights.model_called = True
        weights.num_evaluations += not training
        if torch.is_grad_enabled():
            weights.unmarked |= not weights.uneven
            if training:
                weights.trains = True
                if weights.unreduced_at is not None and not is_compiling():
                    weights.warn_unreduced()

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``call(*args, **kwargs)`` under precision and strategy."""
        engine = self.engine
        if self.on_first_call is not None and not is_compiling():
            self.on_first_call()
            self.on_first_call = None
        # Compiled code cannot look up the batch: the weight of the batch read last is used.
        weight = self.weights.weight_of((args, kwargs)) if self.weights.uneven and not is_compiling() else None
        check = self.job.random_check
        observed = None if check is None or is_compiling() else check.before_forward()
        self.inside = True
        try:
            if self._convert_input is not None:
                args, kwargs = self._convert_input(data=(args, kwargs))
            if self._context is None:
                result = call(*args, **kwargs) if engine is None else engine(call, *args, **kwargs)
            else:
                with self._context():
                    result = call(*args, **kwargs) if engine is None else engine(call, *args, **kwargs)
            if self._convert_output is not None:
                result = self._convert_output(data=result)
            if weight is not None:
                self.weights.mark(result, weight)
            return result
        except RuntimeError as error:
            # A strategy may call collectives in forward too.
            explanation = self.job.explain_error(error) if self.job.explain_error is not None else None
            if explanation is None:
                raise
            raise explanation from error
        finally:
            self.inside = False
            if observed is not None and check is not None:
                check.after_forward(observed)


def _overridden(hooks: Any, name: str) -> Callable[..., Any] | None:
    """Return a hook of the precision, None if it is that of the base class, which does nothing, without wrappers."""
    return None if is_default(hooks, name, Precision) else getattr(hooks, name)


def _make_first_call(plain_call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the ``__call__`` of a free module: after the first call it is that of the user's class again."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: ModuleState | None = self.__dict__.get(KEY)
        if state is not None and not is_compiling():
            for cls in type(self).__mro__:
                if vars(cls).get("__call__") is __call__:
                    type.__delattr__(cls, "__call__")
            if state.on_first_call is not None:
                state.on_first_call()
                state.on_first_call = None
        return plain_call(self, *args, **kwargs)

    return __call__


def _make_call(plain_call: Callable[..., Any]) -> Callable[..., Any]:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: ModuleState | None = self.__dict__.get(KEY)
        if state is None or state.inside:
            return plain_call(self, *args, **kwargs)
        if state.weights.active and not state.job.in_backward:
            state.record_call(self.training)
        return state.run(functools.partial(plain_call, self), args, kwargs)

    return __call__


def _mark_forward_method(self: Any, method: str | Callable[..., Any]) -> None:
    """Make `method` run under the strategy from now on, like a call of the module.

    Raises:
        SettingError: if the module has no such method.
    """
    name = checked_name(self, method)
    for each in _with_original(self):
        # Private methods are guarded only if they are marked.
        for own, function in _own_methods(plain_class(each), name).items():
            setattr(type(each), own, _guarded(own, function))
    self.__dict__[KEY].forward_methods.add(name)


def _itself(self: Any) -> Any:
    """Return the module itself: it is not wrapped.

    Raises:
        AttributeError: to transformers, whose ``unwrap_model`` follows it without end (5.24).
    """
    if str(sys._getframe(1).f_globals.get("__name__")).partition(".")[0] == "transformers":
        raise AttributeError("module")
    return self


class _Device:
    """The attribute ``device`` of a module without one. The user may set another: it has no ``__set__``."""

    def __init__(self, default: torch.device) -> None:
        self.default = default

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self
        return next((tensor.device for tensor in itertools.chain(module.parameters(), module.buffers())), self.default)


def adopt_module(
    module: nn.Module,
    *,
    hooks: Any,
    engine: Any,
    job: JobState,
    forward_methods: tuple[Any, ...],
    device: torch.device | None = None,
) -> None:
    """Adopt `module` in place.

    Args:
        device: that of the rank, for a module without tensors; None leaves out the attribute ``device``.
    """
    names = {checked_name(module, method) for method in forward_methods}
    state = ModuleState(hooks, engine, job, names | {"forward"})
    for each in _with_original(module):
        cls = type(each)
        namespace: dict[str, Any] = {"mark_forward_method": _mark_forward_method}
        if state.free:
            namespace["__call__"] = _make_first_call(cls.__call__)
        else:
            namespace["__call__"] = _make_call(cls.__call__)
            namespace.update((name, _guarded(name, method)) for name, method in _own_methods(cls, *names).items())
        namespace["zero_grad"] = make_zero_grad(cls.zero_grad, cls.__name__, owned=owns_gradients(hooks))
        if not hasattr(each, "module"):
            namespace["module"] = property(_itself)
        if device is not None and not hasattr(each, "device"):
            namespace["device"] = _Device(device)
        adopt(each, state, namespace)


def release_module(module: nn.Module) -> None:
    """Restore the class of the module, and drop the engine with its gradient hooks."""
    for each in _with_original(module):
        release(each)


def compiled_from(module: nn.Module) -> nn.Module | None:
    """Return the original of a module returned by ``torch.compile(module)``, None for any other."""
    return dict(module.named_children()).get(COMPILED.rstrip("."))


def _with_original(module: nn.Module) -> tuple[nn.Module, ...]:
    """Return the module, and the original of a compiled one: the strategy treats them as one."""
    inner = compiled_from(module)
    return (module,) if inner is None else (module, inner)


def checked_name(module: Any, method: str | Callable[..., Any]) -> str:
    """Return the name of one of the module's own methods.

    Raises:
        SettingError: if it has no such method; the message names the closest one.
    """
    name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    methods: dict[str, FunctionType] = {}
    for each in _with_original(module):
        methods.update(_own_methods(plain_class(each), name))
    if name not in methods:
        raise SettingError(
            f"{plain_class(module).__name__} has no method {name!r} to run under the strategy."
            f"{closest(name, methods)} Methods: {', '.join(sorted(methods))}."
        )
    return name


def _own_methods(cls: type, *private: str) -> dict[str, FunctionType]:
    """Return the public methods that the user's classes add to ``nn.Module``, ``forward``, and those in `private`."""
    found: dict[str, Any] = {}
    for klass in cls.__mro__:
        if klass in (nn.Module, object):
            continue
        for name, value in vars(klass).items():
            new = name == "forward" or not hasattr(nn.Module, name)
            if new and (not name.startswith("_") or name in private):
                found.setdefault(name, value)  # an attribute of a derived class hides it, whatever its type
    return {name: value for name, value in found.items() if isinstance(value, FunctionType)}


def _guarded(name: str, method: FunctionType) -> Callable[..., Any]:
    """Return `method` wrapped: a call from outside that runs submodules runs under the strategy, or raises."""
    yields = inspect.isgeneratorfunction(method)

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: ModuleState | None = self.__dict__.get(KEY)
        if state is None or state.free or state.inside or state.job.in_backward:
            return method(self, *args, **kwargs)
        call = functools.partial(method, self)
        marked = state.runs(self, name)
        if marked and state.weights.active:
            state.record_call(self.training)
        run = state.run if marked else functools.partial(_run_refusing, self, name, state)
        if not yields:
            return run(call, args, kwargs)
        if marked:
            args, kwargs = state.hooks.precision_convert_input(data=(args, kwargs))
        return _stepwise(run, call(*args, **kwargs))

    return guarded


def _stepwise(run: Callable[..., Any], generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Run every step of a generator as a separate call: its body runs only then."""

    def advance(value: Any) -> tuple[bool, Any]:
        try:
            return False, generator.send(value)
        except StopIteration as stop:
            return True, stop.value

    value = None
    while True:
        done, item = run(advance, (value,), {})
        if done:
            return item
        value = yield item


def _run_refusing(
    module: nn.Module, name: str, state: ModuleState, call: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    with _refusing_submodules(module, name, state):
        return call(*args, **kwargs)


@contextmanager
def _refusing_submodules(module: nn.Module, name: str, state: ModuleState) -> Iterator[None]:
    """Raise if a submodule with parameters is called: it would run without precision and strategy."""
    paths: dict[int, str] = {}

    def refuse(submodule: nn.Module, _: Any) -> None:
        if state.inside or next(submodule.parameters(recurse=False), None) is None:
            return
        if not paths:  # computed late, since most methods call no submodule
            paths.update((id(each), path) for path, each in module.named_modules() if each is not module)
        if id(submodule) in paths:
            what = f"{type(submodule).__name__} {paths[id(submodule)]!r}"
            raise UsageError(
                f"{type(module).__name__}.{name}() runs {what} outside of the strategy: set the model up with "
                f"forward_methods=({name!r},), or call model.mark_forward_method({name!r}) before."
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
