"""Run one rank of a script under pdb, with exclusive use of the terminal."""

from __future__ import annotations

import bdb
import contextlib
import pdb
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import CodeType, ModuleType, TracebackType

from plugframe.errors import SettingError, UnsupportedError, UsageError
from plugframe.hooks.launcher import Job

#: Timeout of the other ranks while one is debugged: a week, which every timer involved can represent.
DEBUG_TIMEOUT_S = 7 * 24 * 3600


def check_rank(job: Job) -> None:
    """Validate ``job.debug_rank``.

    Raises:
        UsageError: if the job has no such rank, or its ranks have no fixed numbers.
    """
    if job.debug_rank is None:
        return
    asked = f"--debug-rank={job.debug_rank}"
    if job.function is not None:
        raise UnsupportedError(
            f"{asked} requires a script, and this job runs a function: call pdb in it with devices=1."
        )
    if job.min_nodes is not None:
        raise UnsupportedError(f"{asked} requires a fixed --num-nodes: elastic jobs renumber their ranks.")
    num_ranks = job.num_nodes * job.num_processes
    if not 0 <= job.debug_rank < num_ranks:
        raise SettingError(f"{asked}: no such rank, this job has ranks 0 to {num_ranks - 1}.")


def has_debug_rank(job: Job) -> bool:
    """Return whether the rank to debug runs on this node."""
    return job.debug_rank is not None and job.debug_rank // job.num_processes == job.node_rank


@contextlib.contextmanager
def terminal(job: Job) -> Iterator[None]:
    """Give the terminal to the rank under the debugger if it runs on this node, and restore its settings at the end.

    Raises:
        UsageError: if standard input is not a terminal.
    """
    if not has_debug_rank(job):
        if job.debug_rank is not None:
            _log(f"rank {job.debug_rank} runs under a debugger on another node; timeouts are disabled here")
        yield
        return
    if sys.stdin is None or sys.stdin.closed or not sys.stdin.isatty():
        raise UsageError(
            f"--debug-rank={job.debug_rank} needs a terminal on standard input, and there is none: run the command in "
            "a terminal, without a pipe."
        )
    import termios

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    _log(
        f"rank {job.debug_rank} runs under pdb and receives Ctrl-C; Ctrl-\\ ends the job. Timeouts of other ranks "
        "are a week, and failures are not retried."
    )
    # If Ctrl-Z stopped this process, the shell and the debugger would both read from the terminal.
    stop = signal.signal(signal.SIGTSTP, lambda *_: None) if _in_main_thread() else None
    try:
        yield
    finally:
        if stop is not None:
            signal.signal(signal.SIGTSTP, stop)
        # A rank killed while reading a line leaves the terminal in the debugger's mode.
        with contextlib.suppress(termios.error):  # the terminal is closed
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _log(text: str) -> None:
    print(f"plugframe: {text}", file=sys.stderr, flush=True)


def run(code: CodeType, module: ModuleType) -> None:
    """Run a script under pdb: stop at the first line, and at the origin of an uncaught exception.

    Raises:
        KeyboardInterrupt: if the debugger quits, or is asked to restart, which a single rank cannot do.
    """
    debugger = pdb.Pdb()
    debugger.reset()
    sys.settrace(debugger.trace_dispatch)
    try:
        exec(code, module.__dict__)
    except (bdb.BdbQuit, pdb.Restart):
        raise KeyboardInterrupt from None
    except Exception as error:
        sys.settrace(None)
        _post_mortem(error)
        raise
    finally:
        sys.settrace(None)


def _post_mortem(error: BaseException) -> None:
    stack: TracebackType | None = error.__traceback__
    traceback.print_exception(type(error), error, stack.tb_next if stack is not None else None)
    print("Post mortem: quit, or Ctrl-D, to end the job.")
    pdb.post_mortem(stack)
