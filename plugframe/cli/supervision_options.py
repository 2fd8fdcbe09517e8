"""The supervision options of the command line: logs, CPU binding and the debugged rank."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from plugframe.core.config.request import Request, variable
from plugframe.core.planning.plan import Plan
from plugframe.errors import PlugframeWarning, SettingError, UnsupportedError
from plugframe.hooks.launcher import Job
from plugframe.hooks.spelling import variable as variable_of_option
from plugframe.hooks.variables import FROM_COMMAND_LINE, PATIENT
from plugframe.launch.output import parse_tee

if TYPE_CHECKING:
    from plugframe.cli.start import Nodes

#: Names of the settings that end or report a job in which ranks wait.
_TIMEOUT, _REPORT = "timeout_s", "report_after_s"
#: Kinds of plugins whose options are not for the ranks.
_STARTERS = ("environment", "launcher")


def fields(plan: Plan, nodes: Nodes) -> dict[str, Any]:
    """Return the fields of the `Job`.

    Raises:
        UsageError: for a word that means nothing, or a rank that is not there.
        UnsupportedError: for devices that ranks cannot be bound near.
    """
    if nodes.numa_binding is not None and tuple(plan.devices) != tuple(range(len(plan.devices))):
        raise UnsupportedError(
            f"--numa-binding={nodes.numa_binding}: torch binds by local rank, and the devices "
            f"requested are {', '.join(map(str, plan.devices))}: hide the others with CUDA_VISIBLE_DEVICES, and "
            f"request {len(plan.devices)} devices."
        )
    if nodes.tee == "0" and nodes.log_dir is None:
        _no_effect("--tee=0", "without --log-dir all output goes to the terminal")
    if nodes.debug_rank is not None and nodes.max_restarts:
        _no_effect("--max-restarts", "a job with --debug-rank starts once")
    if nodes.log_dir is not None and os.path.lexists(nodes.log_dir) and not os.path.isdir(nodes.log_dir):
        raise SettingError(f"--log-dir={nodes.log_dir} is a file: use a folder, which is created if it does not exist.")
    num_ranks = plan.world_size if nodes.min_nodes is None else None
    return {
        "max_restarts": nodes.max_restarts or 0 if nodes.debug_rank is None else 0,
        "log_dir": None if nodes.log_dir is None else os.path.expanduser(nodes.log_dir),
        "tee": None if nodes.tee is None else parse_tee(nodes.tee, num_ranks),
        "numa_binding": nodes.numa_binding,
        "debug_rank": nodes.debug_rank,
    }


def check(job: Job) -> None:
    """Check a job as far as possible without starting it.

    Raises:
        UsageError: if the rank to be debugged is not there.
    """
    if job.debug_rank is not None:
        from plugframe.launch.debug import check_rank

        check_rank(job)


def patient(variables: Mapping[str, str], request: Request) -> dict[str, str]:
    """Return the ranks' variables with a timeout that outlasts a debugger instead of any other."""
    from plugframe.launch.debug import DEBUG_TIMEOUT_S

    given = [each for each in request.options if each.name == _TIMEOUT and each.kind not in _STARTERS]
    typed = [each.spelled(each.name) for each in given if each.by == "command"]
    commanded = variables[FROM_COMMAND_LINE].split(",")
    typed += ["--timeout"] if _TIMEOUT in commanded else []
    typed += ["--report-after"] if _REPORT in commanded else []
    for option in typed:
        _no_effect(option, "with --debug-rank nothing times out")
    names = [variable(_TIMEOUT), *(variable_of_option(each.kind, each.plugin, each.name) for each in given)]
    commanded = [*filter(None, commanded), *({_TIMEOUT, _REPORT} - set(commanded))]
    # The ranks are known to wait for the one under the debugger: report nothing.
    outlasting = {**dict.fromkeys(names, str(DEBUG_TIMEOUT_S)), variable(_REPORT): "0"}
    return {**variables, **outlasting, PATIENT: "1", FROM_COMMAND_LINE: ",".join(commanded)}


def _no_effect(option: str, why: str) -> None:
    warnings.warn(f"{option} has no effect: {why}.", PlugframeWarning, stacklevel=3)
