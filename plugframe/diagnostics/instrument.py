"""Record every collective call, and explain calls that fail because a rank is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from plugframe.diagnostics.call_log import END, CallLog

#: Hooks that are recorded, and the argument that describes the operation.
RECORDED_HOOKS: dict[str, str | None] = {
    "collective_all_gather": None,
    "collective_all_reduce": "op",
    "collective_reduce_scatter": "op",
    "collective_broadcast": "src",
    "collective_all_gather_object": None,
    "collective_broadcast_object": "src",
    "collective_barrier": None,
    "collective_monitored_barrier": None,
    "strategy_setup_module": None,
    "strategy_setup_optimizers": None,
    "strategy_setup_module_and_optimizers": None,
    "strategy_backward": None,
    "strategy_optimizer_step": None,
    "strategy_clip_gradients": None,
    "checkpoint_save": None,
    "checkpoint_load": None,
}

Explain = Callable[..., Exception | None]


def record(hooks: Any, log: CallLog, explain: Explain) -> Callable[[], None]:
    """Wrap the `RECORDED_HOOKS` of `hooks` to record calls in `log`; return a function that undoes it."""
    hooks.call_log = log
    before = {name: getattr(hooks, name) for name in RECORDED_HOOKS}
    for name, argument in RECORDED_HOOKS.items():
        setattr(hooks, name, _recorded(name, argument, before[name], log, explain))

    def undo() -> None:
        del hooks.call_log
        for name, hook in before.items():
            setattr(hooks, name, hook)

    return undo


def call_log_of(hooks: Any) -> CallLog | None:
    """Return the log that records calls of `hooks`; None if they are not recorded."""
    found: CallLog | None = getattr(hooks, "call_log", None)
    return found


def _recorded(name: str, argument: str | None, hook: Any, log: CallLog, explain: Explain) -> Any:
    begin = log.begin
    argument = argument or ""
    late = name == "collective_monitored_barrier"

    def call(**arguments: Any) -> Any:
        get = arguments.get
        entry = begin(name, get("tensor"), get(argument), get("group") is None)
        try:
            result = hook(**arguments)
        except RuntimeError as error:
            failure = explain(error, late=late)
            entry[END] = True
            if failure is None:
                raise
            raise failure from error
        except BaseException:
            entry[END] = True
            raise
        entry[END] = True
        return result

    return call
