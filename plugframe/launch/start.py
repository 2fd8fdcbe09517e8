"""Launch the ranks of a job from the current process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from plugframe.core.config.request import Request
from plugframe.core.planning.plan import Choice, Plan
from plugframe.core.registry.registry import Registry
from plugframe.errors import OrderError, RankFailedError, UnsupportedError
from plugframe.hooks.launcher import Job
from plugframe.hooks.variables import LAUNCHED
from plugframe.launch.choose import choose_launcher


def start_script(plan: Plan, request: Request, registry: Registry) -> None:
    """Run the current script on every rank, supervise the ranks, and exit with their exit code.

    Raises:
        SystemExit: always, with the ranks' exit code: the rest of the script runs on the ranks only.
    """
    from plugframe.launch import script_command

    options, command = script_command()
    choice, launcher = _launcher(request, registry, "script")
    try:
        launcher.launcher_launch(job=_job(plan, choice, interpreter_options=options, command=command))
    except RankFailedError as error:
        print(error.report, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    raise SystemExit(0)


def start_function(
    plan: Plan, request: Request, registry: Registry, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    """Call ``function(*args)`` on every rank and return rank 0's result."""
    target = "interactive" if _is_interactive(function, args) else "function"
    choice, launcher = _launcher(request, registry, target)
    try:
        return launcher.launcher_launch(job=_job(plan, choice, function=function, args=args))
    except RankFailedError as error:
        from plugframe.launch.excepthook import JobInterrupt, install_excepthook

        install_excepthook()
        if error.exit_code == 128 + signal.SIGINT:
            raise JobInterrupt(error) from None
        raise


def runs_scripts(request: Request, registry: Registry) -> bool:
    """Return whether the launcher that would run a function can run the script instead."""
    return "script" in choose_launcher(request, registry, "function").descriptor.provides


def not_launched(plan: Plan, call: str) -> OrderError:
    """Return the error for a call that requires the job's processes before they are launched."""
    return OrderError(
        f"{call}() needs {plan.world_size} ranks (devices: {plan.devices_reason}), and this is one process: call "
        "lite.launch() first, or start the script with `plugframe run`; for a single device use Lite(devices=1)."
    )


def _launcher(request: Request, registry: Registry, target: str) -> tuple[Choice, Any]:
    from plugframe.launch.function import refuse_while_importing

    refuse_while_importing()
    if os.environ.get(LAUNCHED):
        setting = request.get("environment")
        origin = f"environment={setting.value!r} in {setting.source}" if setting else "the detected environment"
        raise OrderError(
            f"This process is already a rank of a job, but {origin} does not report one: omit environment=."
        )
    choice = choose_launcher(request, registry, target)
    return choice, choice.make(registry)


def _job(plan: Plan, launcher: Choice, **fields: Any) -> Job:
    if plan.num_nodes > 1 and "nodes" not in launcher.descriptor.provides:
        raise UnsupportedError(
            f"launch() starts the ranks of one node, and num_nodes={plan.num_nodes}: start the script on every node "
            "with `plugframe run --num-nodes N --node-rank K --main-address HOST script.py`, or under a scheduler."
        )
    return Job(num_processes=len(plan.devices), num_nodes=plan.num_nodes, **fields)


def _is_interactive(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Return whether the function or an argument is defined in a ``__main__`` that other processes cannot import."""
    main = sys.modules.get("__main__")
    if main is None or getattr(main, "__file__", None) or getattr(main, "__spec__", None):
        return False
    return any(getattr(thing, "__module__", None) == "__main__" for thing in (function, *args))
