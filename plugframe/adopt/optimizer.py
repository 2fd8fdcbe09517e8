"""Adopt an optimizer in place: its step runs under strategy and precision."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

from torch.optim import Optimizer

from plugframe.adopt.job_state import JobState
from plugframe.base.precision import Precision
from plugframe.base.strategy import Strategy
from plugframe.hooks.strategy import no_step
from plugframe.utils.logging import warn_caller
from plugframe.utils.swap import KEY, State, adopt, release
from plugframe.utils.unlabelled import without_label, zero_grad_without_label

ParameterNames = list[list[str]]


class OptimizerState(State):
    """State of an adopted optimizer.

    Attributes:
        patched: the ``step`` that a scheduler set on the instance, None if there was none.
        inside: whether a step is running: a loss scaler that calls ``step`` then calls the original.
        names: names of its parameters by group at set-up; None if they are unknown.
        job: state of the job; None in tests of one optimizer.
        check_backward: whether to warn after the first step if ``lite.backward`` was not called.
        num_steps: number of steps, including those before the checkpoint it was resumed from.
        num_steps_here: number of steps in this process.
        mean: returns the mean over ranks of the loss of a closure; None on one rank.
        compare: compares settings between ranks, given the number of steps; None on one rank.
        skip: returns whether an extension skips this step, the same on all ranks; None without such an extension.
        skipping: whether the running step is skipped.
        plain: whether a step is the optimizer's own and is counted, and nothing else: set after the first one.
        on_first_step: called before the first step in this process; None after it.
    """

    #: Those in use. At class level, since `plugframe.launch.rank` reads it after an error and holds no optimizer.
    alive: ClassVar[weakref.WeakSet[OptimizerState]] = weakref.WeakSet()

    def __init__(
        self,
        optimizer: Optimizer,
        hooks: Any,
        names: ParameterNames | None,
        job: JobState | None,
        *,
        check_backward: bool,
    ) -> None:
        self.hooks = hooks
        self.names = names
        self.patched: Callable[..., Any] | None = optimizer.__dict__.pop("step", None)
        self.inside = False
        self.num_steps = 0
        self.num_steps_here = 0
        self.job = job
        self.check_backward = check_backward
        self.mean: Callable[[Any], Any] | None = None
        self.compare: Callable[[int], None] | None = None
        self.on_first_step: Callable[[], None] | None = None
        self.skip: Callable[[Optimizer], bool] | None = None
        self.skipping = False
        self.plain = False
        self.alive.add(self)

    def is_plain(self) -> bool:
        """Return whether nothing is to be done at a step from now on: one rank, and hooks that do nothing."""
        return (
            self.job is not None
            and self.job.alone
            and self.job.random_check is None
            and self.compare is None
            and self.skip is None
            and self.hooks.on_optimizer_step is None
            and is_default(self.hooks, "strategy_optimizer_step", Strategy)
            and is_default(self.hooks, "precision_optimizer_step", Precision)
        )

    def plain_dict(self, obj: Any) -> dict[str, Any]:
        """Return the attributes of the plain object."""
        return {key: value for key, value in obj.__dict__.items() if key not in (KEY, "step")}


def adopt_optimizer(
    optimizer: Optimizer,
    *,
    hooks: Any,
    names: ParameterNames | None = None,
    job: JobState | None = None,
    check_backward: bool = False,
    mean: Callable[[Any], Any] | None = None,
    compare: Callable[[int], None] | None = None,
    skip: Callable[[Optimizer], bool] | None = None,
    on_first_step: Callable[[], None] | None = None,
) -> None:
    """Adopt `optimizer` in place."""
    state = OptimizerState(optimizer, hooks, names, job, check_backward=check_backward)
    state.mean, state.compare, state.skip, state.on_first_step = mean, compare, skip, on_first_step
    cls = type(optimizer)
    namespace: dict[str, Any] = {"step": _make_step(cls.step, without_label(cls.step, cls.__name__), state.patched)}
    namespace["zero_grad"] = make_zero_grad(cls.zero_grad, cls.__name__, owned=owns_gradients(hooks))
    if not hasattr(optimizer, "optimizer"):
        namespace["optimizer"] = property(_itself)
    adopt(optimizer, state, namespace)


def owns_gradients(hooks: Any) -> bool:
    """Return whether the strategy stores gradients outside of the parameters' ``grad``."""
    return hasattr(hooks, "strategy_zero_grad") and not is_default(hooks, "strategy_zero_grad", Strategy)


def is_default(hooks: Any, name: str, base: type) -> bool:
    """Return whether a hook is that of the base class of its kind, without wrappers."""
    return getattr(getattr(hooks, name), "__func__", None) is getattr(base, name)


def make_zero_grad(original: Callable[..., Any], name: str, *, owned: bool) -> Callable[..., Any]:
    """Return a ``zero_grad`` that checks for micro-batches, and resets the gradients of the strategy if it has any."""
    run = zero_grad_without_label(original, name)

    @functools.wraps(original)
    def zero_grad(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(KEY)
        if state is not None and state.job is not None and state.job.accumulation is not None:
            state.job.accumulation.on_zero_grad(self)
        result = run(self, *args, **kwargs)
        if owned and state is not None:
            state.hooks.strategy_zero_grad(owner=self)
        return result

    return zero_grad


def release_optimizer(optimizer: Optimizer) -> None:
    """Restore the class of the optimizer, and the ``step`` that a scheduler set."""
    state = release(optimizer)
    if state.patched is not None and "step" not in optimizer.__dict__:
        optimizer.__dict__["step"] = state.patched


def set_num_steps(optimizer: Any, step: int) -> None:
    """Set the number of steps, if this is an adopted optimizer."""
    state = getattr(optimizer, "__dict__", {}).get(KEY)
    if isinstance(state, OptimizerState):
        state.num_steps = step


def steps_made() -> int:
    """Return the largest number of steps of any optimizer in use."""
    return max((state.num_steps for state in OptimizerState.alive), default=0)


def _itself(self: Any) -> Any:
    """Return the optimizer itself: it is not wrapped."""
    return self


def _make_step(
    original: Callable[..., Any], run: Callable[..., Any], patched: Callable[..., Any] | None
) -> Callable[..., Any]:
    """Return the ``step`` of an adopted optimizer.

    Args:
        original: that of the user's class, whose name and documentation it gets.
        run: the same, maybe without a label for profilers.
        patched: the ``step`` that a scheduler set on the instance, None if there was none.
    """

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: OptimizerState | None = self.__dict__.get(KEY)
        if (
            state is not None
            and state.plain
            and not state.inside
            and state.job.accumulation is None  # type: ignore[union-attr]
            and len(args) < 2  # more are arguments of a custom signature, which is checked
        ):
            state.inside = True
            try:
                result = run(self, *args, **kwargs) if patched is None else patched(*args, **kwargs)
            finally:
                state.inside = False
            state.num_steps += 1
            state.num_steps_here += 1
            return result
        # A scheduler's `step` references the optimizer weakly; a bound method stored here would not.
        inner = patched or functools.partial(run, self)
        if state is None or state.inside:  # released, but a scheduler still holds this function
            # A loss scaler may call this method instead of the step it was given.
            return None if state is not None and state.skipping else inner(*args, **kwargs)
        return _step(state, self, inner, args, kwargs)

    # A hack: torch marks a step that it has instrumented, or a scheduler wrapped, by attributes of the function.
    marked: Any = step
    marked.hooked = True
    if hasattr(patched, "_wrapped_by_lr_sched"):
        marked._wrapped_by_lr_sched = True
    return step


def _step(
    state: OptimizerState, optimizer: Any, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a step under strategy and precision, and what is due at one."""
    job = state.job
    if job is not None and job.accumulation is not None:
        job.accumulation.on_step(optimizer)
    closure = None
    if args or kwargs:
        inner, closure = _split_closure(inner, args, kwargs)
        if closure is not None and state.mean is not None:
            closure = _averaged(closure, state.mean)
    if state.on_first_step is not None:
        state.on_first_step()
        state.on_first_step = None
    if state.compare is not None:
        state.compare(state.num_steps_here)
    state.inside = True
    try:
        skipped = state.skip is not None and state.skip(optimizer)
        if skipped:
            result = None
            _skip(state, optimizer)
        else:
            result = state.hooks.strategy_optimizer_step(optimizer=optimizer, step=inner, closure=closure)
    finally:
        state.inside = False
    state.num_steps += 1
    state.num_steps_here += 1
    if job is not None:
        if state.check_backward:
            _warn_if_unconverted(optimizer, job)
            state.check_backward = False
        if job.random_check is not None and job.random_check.after_step():
            job.random_check = None
    if state.hooks.on_optimizer_step is not None and not skipped:
        state.hooks.on_optimizer_step(optimizer=optimizer)
    if state.num_steps_here == 1:
        state.plain = state.is_plain()
    return result


def _skip(state: OptimizerState, optimizer: Optimizer) -> None:
    state.skipping = True
    try:
        skip = state.hooks.strategy_skip_step
        if skip is not None:
            skip(optimizer=optimizer)
        else:  # a strategy that has neither the hook nor the default of its specification
            state.hooks.strategy_optimizer_step(optimizer=optimizer, step=no_step, closure=None)
    finally:
        state.skipping = False


def _averaged(closure: Callable[[], Any], mean: Callable[[Any], Any]) -> Callable[[], Any]:
    """Return a closure that returns the mean loss of all ranks, so that a line search decides consistently."""

    @functools.wraps(closure)
    def averaged() -> Any:
        return mean(closure())

    return averaged


def _warn_if_unconverted(optimizer: Optimizer, job: JobState) -> None:
    """Warn if there are gradients and ``lite.backward`` was never called, as in a partially converted script."""
    if job.backward_called or all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
        return
    warn_caller(
        "An optimizer stepped on gradients of loss.backward(): call lite.backward(loss), which scales losses in "
        "float16, weighs uneven batches, and which some strategies need."
    )


def _split_closure(
    inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], Callable[[], Any] | None]:
    """Return the step bound to all arguments except the closure, and the closure."""
    if len(args) > 1 or (args and ("closure" in kwargs or not (args[0] is None or callable(args[0])))):
        # A custom signature, such as ``step(loss)``. By keyword, since a loss scaler forwards only keyword arguments.
        signature = inspect.signature(inner)
        signature.bind(*args, **kwargs)  # raises TypeError
        named = dict(zip(signature.parameters, args, strict=False))
        return functools.partial(inner, **named, **kwargs), None
    closure = args[0] if args else kwargs.pop("closure", None)
    return (functools.partial(inner, **kwargs) if kwargs else inner), closure
