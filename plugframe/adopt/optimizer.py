"""The user's optimizer, whose step runs under strategy and precision."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch.optim import Optimizer

from plugframe.base.strategy import Strategy
from plugframe.utils.logging import warn_caller
from plugframe.utils.swap import KEY, State, adopt, release

if TYPE_CHECKING:
    from plugframe.adopt.module import Phase

Names = list[list[str]]


class OptimizerState(State):
    """What an adopted optimizer knows.

    Attributes:
        patched: the ``step`` a scheduler had put on the instance, None if there was none.
        inside: whether a step is running, so that a loss scaler that calls ``step`` gets the inner one.
        names: of its parameters by group, when it was set up; None if they were not known.
        phase: asked once, after the first step, whether the gradients came by way of `Lite`; None where nobody asks.
        job: says whether random numbers are still compared between the ranks, after the first steps.
        steps: how many it has made, those before the checkpoint it was resumed from included.
        mean: makes the loss that a closure returns that of all ranks; None on one rank.
        compare: compares settings with those of the other ranks, given the steps made; None on one rank.
    """

    #: Those in use. The launcher's side of a rank asks when the rank has failed, and no object leads it here.
    alive: ClassVar[weakref.WeakSet[OptimizerState]] = weakref.WeakSet()

    def __init__(
        self, optimizer: Optimizer, hooks: Any, names: Names | None, phase: Phase | None, job: Phase | None
    ) -> None:
        self.hooks = hooks
        self.names = names
        self.patched: Callable[..., Any] | None = optimizer.__dict__.pop("step", None)
        self.inside = False
        self.steps = 0
        self.phase = phase
        self.job = job
        self.made = 0
        self.mean: Callable[[Any], Any] | None = None
        self.compare: Callable[[int], None] | None = None
        self.alive.add(self)

    def plain_dict(self, obj: Any) -> dict[str, Any]:
        """Return the attributes of the plain object."""
        return {key: value for key, value in obj.__dict__.items() if key not in (KEY, "step")}


def adopt_optimizer(
    optimizer: Optimizer,
    *,
    hooks: Any,
    names: Names | None = None,
    phase: Phase | None = None,
    job: Phase | None = None,
    mean: Callable[[Any], Any] | None = None,
    compare: Callable[[int], None] | None = None,
) -> None:
    """Adopt `optimizer` in place."""
    state = OptimizerState(optimizer, hooks, names, phase, job)
    state.mean, state.compare = mean, compare
    namespace: dict[str, Any] = {"step": _make_step(type(optimizer).step, state.patched)}
    if keeps_gradients(hooks):
        namespace["zero_grad"] = zeroing(type(optimizer).zero_grad)
    if not hasattr(optimizer, "optimizer"):
        namespace["optimizer"] = property(_itself)
    adopt(optimizer, state, namespace)


def keeps_gradients(hooks: Any) -> bool:
    """Say whether the strategy keeps gradients beside those of the parameters."""
    hook = getattr(hooks, "strategy_zero_grad", None)
    return hook is not None and getattr(hook, "__func__", None) is not Strategy.strategy_zero_grad


def zeroing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``zero_grad`` that has the strategy forget gradients too."""

    @functools.wraps(original)
    def zero_grad(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        state = self.__dict__.get(KEY)
        if state is not None:
            state.hooks.strategy_zero_grad(owner=self)
        return result

    return zero_grad


def release_optimizer(optimizer: Optimizer) -> None:
    """Give the optimizer back as it was, with the step a scheduler had wrapped."""
    state = release(optimizer)
    if state.patched is not None and "step" not in optimizer.__dict__:
        optimizer.__dict__["step"] = state.patched


def resumed_at(optimizer: Any, step: int) -> None:
    """Count on from `step`, if this is an adopted optimizer."""
    state = getattr(optimizer, "__dict__", {}).get(KEY)
    if isinstance(state, OptimizerState):
        state.steps = step


def steps_made() -> int:
    """Return the most steps that any optimizer in use has made."""
    return max((state.steps for state in OptimizerState.alive), default=0)


def _itself(self: Any) -> Any:
    """The optimizer itself: there is nothing to unwrap."""
    return self


def _make_step(original: Callable[..., Any], patched: Callable[..., Any] | None) -> Callable[..., Any]:
    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: OptimizerState | None = self.__dict__.get(KEY)
        # What a scheduler put on the instance holds the optimizer weakly, and so must what is made here.
        inner = patched or functools.partial(original, self)
        if state is None or state.inside:  # given back, but a scheduler still holds this function
            return inner(*args, **kwargs)
        closure = None
        if args or kwargs:
            inner, closure = _bound(inner, args, kwargs)
            if closure is not None and state.mean is not None:
                closure = _averaged(closure, state.mean)
        if state.compare is not None:
            state.compare(state.made)
        state.inside = True
        try:
            result = state.hooks.strategy_optimizer_step(optimizer=self, step=inner, closure=closure)
        finally:
            state.inside = False
        state.steps += 1
        state.made += 1
        if state.phase is not None:
            _check_gradients(self, state.phase)
            state.phase = None
        if state.job is not None and state.job.draws is not None and state.job.draws.at_step():
            state.job.draws = None
        if state.hooks.on_optimizer_step is not None:
            state.hooks.on_optimizer_step(optimizer=self)
        return result

    # torch marks a step it has instrumented, and one a scheduler has wrapped, by attributes of the function.
    marked: Any = step
    marked.hooked = True
    if hasattr(patched, "_wrapped_by_lr_sched"):
        marked._wrapped_by_lr_sched = True
    return step


def _averaged(closure: Callable[[], Any], mean: Callable[[Any], Any]) -> Callable[[], Any]:
    """Return a closure whose loss is that of all ranks: a line search must decide alike on each."""

    @functools.wraps(closure)
    def averaged() -> Any:
        return mean(closure())

    return averaged


def _check_gradients(optimizer: Optimizer, phase: Phase) -> None:
    """Say it if there are gradients and ``lite.backward`` was never called, as in a script that is half converted."""
    if phase.called or all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
        return
    warn_caller(
        "An optimizer stepped on gradients of loss.backward(): call lite.backward(loss), which scales losses in "
        "float16, weighs uneven batches, and which some strategies need."
    )


def _bound(
    inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], Callable[[], Any] | None]:
    """Return the step with all its arguments but the closure, and the closure."""
    if len(args) > 1 or (args and ("closure" in kwargs or not (args[0] is None or callable(args[0])))):
        # A signature of the optimizer's own, as in ``step(loss)``. By keyword: a loss scaler hands on only those.
        signature = inspect.signature(inner)
        signature.bind(*args, **kwargs)  # refuses what does not fit
        named = dict(zip(signature.parameters, args, strict=False))
        return functools.partial(inner, **named, **kwargs), None
    closure = args[0] if args else kwargs.pop("closure", None)
    return (functools.partial(inner, **kwargs) if kwargs else inner), closure
