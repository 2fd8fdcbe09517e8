"""The user's optimizer, whose step runs under strategy and precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from plugframe.adopt.swap import KEY, adopt, release


class OptimizerState:
    """What an adopted optimizer knows.

    Attributes:
        original: the user's class.
        inner: the user's own step, with what learning-rate schedulers wrapped around it.
        patched: the ``step`` a scheduler had put on the instance, None if there was none.
        inside: whether a step is running, so that a loss scaler that calls ``step`` gets the inner one.
    """

    original: Any

    def __init__(self, optimizer: Optimizer, hooks: Any) -> None:
        self.hooks = hooks
        self.patched: Callable[..., Any] | None = optimizer.__dict__.pop("step", None)
        self.inner = self.patched or functools.partial(type(optimizer).step, optimizer)
        self.inside = False

    def plain_dict(self, obj: Any) -> dict[str, Any]:
        """Return the attributes of the plain object."""
        return {key: value for key, value in obj.__dict__.items() if key not in (KEY, "step")}


def adopt_optimizer(optimizer: Optimizer, *, hooks: Any) -> None:
    """Adopt `optimizer` in place."""
    state = OptimizerState(optimizer, hooks)
    adopt(optimizer, state, {"step": _make_step(type(optimizer).step, state.patched)})


def release_optimizer(optimizer: Optimizer) -> None:
    """Give the optimizer back as it was, with the step a scheduler had wrapped."""
    state = release(optimizer)
    if state.patched is not None and "step" not in optimizer.__dict__:
        optimizer.__dict__["step"] = state.patched


def _make_step(original: Any, patched: Any) -> Callable[..., Any]:
    @functools.wraps(original)
    def step(self: Any, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        state = self.__dict__.get(KEY)
        if state is None:  # given back, but a scheduler still holds this function
            return original(self, closure, **kwargs)
        inner = functools.partial(state.inner, **kwargs) if kwargs else state.inner
        if state.inside:
            return inner() if closure is None else inner(closure)
        state.inside = True
        try:
            result = state.hooks.strategy_optimizer_step(optimizer=self, step=inner, closure=closure)
        finally:
            state.inside = False
        if state.hooks.on_optimizer_step is not None:
            state.hooks.on_optimizer_step(optimizer=self)
        return result

    # torch marks a step it has instrumented, and one a scheduler has wrapped, by attributes of the function.
    marked: Any = step
    marked.hooked = True
    if hasattr(patched, "_wrapped_by_lr_sched"):
        marked._wrapped_by_lr_sched = True
    return step
