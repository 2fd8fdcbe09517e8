"""Record every collective call, and explain calls that fail because a rank is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from plugframe.diagnostics.call_log import END, GROUP, CallLog

#: Hooks that are recorded, and the argument that describes the operation.
RECORDED_HOOKS: dict[str, str | None] = {
    "collective_all_gather": None,
    "collective_all_reduce": "op",
    "collective_reduce_scatter": "op",
    "collective_broadcast": "src",
    "collective_send": "dst",
    "collective_recv": "src",
    "collective_all_to_all": None,
    "collective_scatter": "src",
    "collective_all_gather_object": None,
    "collective_gather_object": "dst",
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
#: The arguments of `CallLog.begin` after the hook's name.
Description = tuple[Any, Any, bool, int | None]


class _Shaped(NamedTuple):
    """The dtype of a tensor, and the part of its shape that is equal on all ranks, for display."""

    shape: str
    dtype: Any


def _message(arguments: dict[str, Any]) -> Description:
    # Ranks send different messages, so that these do not count as calls of all ranks.
    name = "dst" if "dst" in arguments else "src"
    group = "" if arguments["group"] is None else GROUP
    return arguments["tensor"], f"{name}={arguments[name]} tag={arguments['tag']}{group}", False, arguments[name]


def _all_to_all(arguments: dict[str, Any]) -> Description:
    tensor, sizes = arguments["tensor"], arguments["input_sizes"]
    if sizes is not None:
        tensor = _Shaped(f"({', '.join(['*', *map(str, tensor.shape[1:])])})", tensor.dtype)
    return tensor, None, arguments["group"] is None, None


def _scatter(arguments: dict[str, Any]) -> Description:
    tensor = _Shaped("", arguments["tensor"].dtype)  # a stack on one rank, and a row on the others
    return tensor, arguments["src"], arguments["group"] is None, None


def _gather_object(arguments: dict[str, Any]) -> Description:
    return None, f"dst={arguments['dst']}", arguments["group"] is None, None


#: Hooks that need more than their tensor and one argument to be described.
_DESCRIBED: dict[str, Callable[[dict[str, Any]], Description]] = {
    "collective_send": _message,
    "collective_recv": _message,
    "collective_all_to_all": _all_to_all,
    "collective_scatter": _scatter,
    "collective_gather_object": _gather_object,
}


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
    describe = _DESCRIBED.get(name)

    def call(**arguments: Any) -> Any:
        if describe is None:
            get = arguments.get
            entry = begin(name, get("tensor"), get(argument), get("group") is None)
        else:
            entry = begin(name, *describe(arguments))
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
