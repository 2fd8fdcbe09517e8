"""The user's module, whose call runs under precision and strategy."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn.modules.module import register_module_forward_pre_hook

from plugframe.adopt.optimizer import keeps_gradients, zeroing
from plugframe.base.precision import Precision
from plugframe.data.batch_weights import Weights
from plugframe.errors import SettingError, UsageError, closest
from plugframe.utils.swap import KEY, State, adopt, plain_class, release

if TYPE_CHECKING:
    from plugframe.data.random_check import DrawCheck

#: What ``torch.compile(module)`` puts before every key of the module's state.
COMPILED = "_orig_mod."


class Phase:
    """What a job is doing now.

    Attributes:
        backward: whether gradients are being computed: a forward that runs then is one run again, by activation
            checkpointing, in the middle of a call that is over.
        called: whether ``lite.backward`` was ever called.
        draws: looks at the random numbers of the first steps; None once it has.
        backwards: how many backwards exchanged gradients.
        local: whether a backward that runs now exchanges nothing.
        explain: makes of an error that came of another rank the one that says where all ranks are; None with one.
        weights: of the batches at hand.
    """

    backward = False
    called = False
    draws: DrawCheck | None = None
    backwards = 0
    local = False
    explain: Callable[[RuntimeError], Exception | None] | None = None

    def __init__(self) -> None:
        self.weights = Weights()


def counting(phase: Phase, no_sync: Callable[..., Any]) -> Callable[..., Any]:
    """Return the hook ``strategy_no_sync`` so that `phase` knows whether a backward exchanges gradients."""

    @contextmanager
    def noted(context: Any, enabled: bool) -> Iterator[None]:
        before, phase.local = phase.local, enabled
        try:
            with context:
                yield
        finally:
            phase.local = before

    def counted(**arguments: Any) -> Any:
        return noted(no_sync(**arguments), arguments["enabled"])

    return counted


class ModuleState(State):
    """What an adopted module knows.

    Attributes:
        engine: what the strategy keeps beside the module, called as ``engine(call, *args, **kwargs)``; or None.
        forward_methods: methods that run under the strategy.
        inside: whether a call is running under the strategy now, so that everything below runs as it is.
    """

    def __init__(self, hooks: Any, engine: Any, phase: Phase, forward_methods: set[str]) -> None:
        self.hooks = hooks
        self.engine = engine
        self.phase = phase
        self.weights = phase.weights
        self.forward_methods = forward_methods
        self.inside = False
        # What the precision leaves as it is costs nothing: three calls for each forward would.
        self._convert_input = _own(hooks, "precision_convert_input")
        self._convert_output = _own(hooks, "precision_convert_output")
        self._context = _own(hooks, "precision_forward_context")

    def note(self, training: bool) -> None:
        """Note what the script uses the model for, which says what it reads a loader for."""
        weights = self.weights
        weights.used = True
        if torch.is_grad_enabled():
            weights.graded |= not weights.uneven
            if training:
                weights.trains = True
                if weights.parts is not None and not is_compiling():
                    weights.check_parts()

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``call(*args, **kwargs)`` under precision and strategy."""
        engine = self.engine
        # A compiled step is not looked into: there the batch read last counts.
        weight = self.weights.of((args, kwargs)) if self.weights.uneven and not is_compiling() else None
        draws = self.phase.draws
        drawn = None if draws is None or is_compiling() else draws.enter()
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
            # A strategy may exchange in forward too.
            failure = self.phase.explain(error) if self.phase.explain is not None else None
            if failure is None:
                raise
            raise failure from error
        finally:
            self.inside = False
            if drawn is not None and draws is not None:
                draws.leave(drawn)


def _own(hooks: Any, name: str) -> Callable[..., Any] | None:
    """Return a hook of the precision, None if it is the base's, which does nothing, and nothing wraps it."""
    hook = getattr(hooks, name)
    return None if getattr(hook, "__func__", None) is getattr(Precision, name) else hook


def _calling(plain_call: Callable[..., Any]) -> Callable[..., Any]:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: ModuleState | None = self.__dict__.get(KEY)
        if state is None or state.inside:
            return plain_call(self, *args, **kwargs)
        if state.weights.active and not state.phase.backward:
            state.note(self.training)
        return state.run(functools.partial(plain_call, self), args, kwargs)

    return __call__


def _mark_forward_method(self: Any, method: str | Callable[..., Any]) -> None:
    """Let `method` run under the strategy from now on, as calling the module does.

    Raises:
        SettingError: if the module has no such method.
    """
    name = checked_name(self, method)
    for part in _both(self):
        # Private methods are watched only once they are marked.
        for own, function in _own_methods(plain_class(part), name).items():
            setattr(type(part), own, _guarded(own, function))
    self.__dict__[KEY].forward_methods.add(name)


def _itself(self: Any) -> Any:
    """The module itself: there is nothing to unwrap."""
    return self


def adopt_module(module: nn.Module, *, hooks: Any, engine: Any, phase: Phase, forward_methods: tuple[Any, ...]) -> None:
    """Adopt `module` in place."""
    names = {checked_name(module, method) for method in forward_methods}
    state = ModuleState(hooks, engine, phase, names | {"forward"})
    for part in _both(module):
        cls = type(part)
        namespace: dict[str, Any] = {name: _guarded(name, fn) for name, fn in _own_methods(cls, *names).items()}
        namespace.update(__call__=_calling(cls.__call__), mark_forward_method=_mark_forward_method)
        if keeps_gradients(hooks):
            namespace["zero_grad"] = zeroing(cls.zero_grad)
        if not hasattr(part, "module"):
            namespace["module"] = property(_itself)
        adopt(part, state, namespace)


def release_module(module: nn.Module) -> None:
    """Give the module back as it was. The engine goes, and with it its gradient hooks."""
    for part in _both(module):
        release(part)


def compiled_from(module: nn.Module) -> nn.Module | None:
    """Return the module that ``torch.compile(module)`` made this one of, None for any other."""
    return dict(module.named_children()).get(COMPILED.rstrip("."))


def _both(module: nn.Module) -> tuple[nn.Module, ...]:
    """Return the module and, of a compiled one, the module it was made of: they are one to the strategy."""
    inner = compiled_from(module)
    return (module,) if inner is None else (module, inner)


def checked_name(module: Any, method: str | Callable[..., Any]) -> str:
    """Return the name of one of the module's own methods.

    Raises:
        SettingError: if it has no such method, with the closest one.
    """
    name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    methods: dict[str, FunctionType] = {}
    for part in _both(module):
        methods.update(_own_methods(plain_class(part), name))
    if name not in methods:
        raise SettingError(
            f"{plain_class(module).__name__} has no method {name!r} to run under the strategy."
            f"{closest(name, methods)} Methods: {', '.join(sorted(methods))}."
        )
    return name


def _own_methods(cls: type, *private: str) -> dict[str, FunctionType]:
    """Return the public methods the user's classes have besides those of ``nn.Module``, `private` and ``forward``."""
    found: dict[str, Any] = {}
    for klass in cls.__mro__:
        if klass in (nn.Module, object):
            continue
        for name, value in vars(klass).items():
            new = name == "forward" or not hasattr(nn.Module, name)
            if new and (not name.startswith("_") or name in private):
                found.setdefault(name, value)  # what a derived class put in its place, whatever it is, hides it
    return {name: value for name, value in found.items() if isinstance(value, FunctionType)}


def _guarded(name: str, method: FunctionType) -> Callable[..., Any]:
    """Return `method` so that, called from outside, it runs under the strategy or is watched."""
    yields = inspect.isgeneratorfunction(method)

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: ModuleState | None = self.__dict__.get(KEY)
        if state is None or state.inside or state.phase.backward:
            return method(self, *args, **kwargs)
        call = functools.partial(method, self)
        marked = name in state.forward_methods
        if marked and state.weights.active:
            state.note(self.training)
        run = state.run if marked else functools.partial(_run_watched, self, name, state)
        if not yields:
            return run(call, args, kwargs)
        if marked:
            args, kwargs = state.hooks.precision_convert_input(data=(args, kwargs))
        return _stepwise(run, call(*args, **kwargs))

    return guarded


def _stepwise(run: Callable[..., Any], generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Run every step of a generator as a call of its own: its body runs only then."""

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


def _run_watched(
    module: nn.Module, name: str, state: ModuleState, call: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    with _watched(module, name, state):
        return call(*args, **kwargs)


@contextmanager
def _watched(module: nn.Module, name: str, state: ModuleState) -> Iterator[None]:
    """Refuse a forward of a part with parameters: it would compute without precision and strategy."""
    parts: dict[int, str] = {}

    def refuse(part: nn.Module, _: Any) -> None:
        if state.inside or next(part.parameters(recurse=False), None) is None:
            return
        if not parts:  # only now: most methods run no part
            parts.update((id(each), path) for path, each in module.named_modules() if each is not module)
        if id(part) in parts:
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
