"""One rank of a script under a debugger, with the terminal to itself."""

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

#: How long the other ranks wait for the one under the debugger: a week, which every clock involved can count.
PATIENCE_S = 7 * 24 * 3600


def check_rank(job: Job) -> None:
    """Check that the rank to be debugged is one of the job's.

    Raises:
        UsageError: if it is not, or cannot be known.
    """
    if job.debug_rank is None:
        return
    asked = f"--debug-rank={job.debug_rank}"
    if job.function is not None:
        raise UnsupportedError(
            f"{asked} is for a script, and this job is a function: call pdb inside it on one device."
        )
    if job.min_nodes is not None:
        raise UnsupportedError(f"{asked}: nodes that come and go number the ranks anew: take a fixed --num-nodes.")
    num_ranks = job.num_nodes * job.num_processes
    if not 0 <= job.debug_rank < num_ranks:
        raise SettingError(f"{asked}: there is no such rank, ranks go from 0 to {num_ranks - 1} here.")


def is_here(job: Job) -> bool:
    """Say whether this node has the rank to be debugged."""
    return job.debug_rank is not None and job.debug_rank // job.num_processes == job.node_rank


@contextlib.contextmanager
def terminal(job: Job) -> Iterator[None]:
    """Hand the terminal to the rank to be debugged, if it is on this node; put the terminal's settings back at the end.

    Raises:
        UsageError: if standard input is no terminal.
    """
    if not is_here(job):
        if job.debug_rank is not None:
            _say(f"rank {job.debug_rank} runs under a debugger on another node; here nothing times out.")
        yield
        return
    if sys.stdin is None or sys.stdin.closed or not sys.stdin.isatty():
        raise UsageError(
            f"--debug-rank={job.debug_rank} needs a terminal on standard input, and there is none: type the command in "
            "a terminal, with nothing piped into it."
        )
    import termios

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    _say(
        f"rank {job.debug_rank} runs under pdb: the terminal and Ctrl-C are its own, Ctrl-\\ ends the job. The other "
        "ranks wait for it: timeouts are a week, and a failure starts nothing again."
    )
    # Stopped by Ctrl-Z, this process would leave the terminal to the shell and to the debugger at once.
    stop = signal.signal(signal.SIGTSTP, lambda *_: None) if _in_main_thread() else None
    try:
        yield
    finally:
        if stop is not None:
            signal.signal(signal.SIGTSTP, stop)
        # A rank that is ended while it reads a line leaves the terminal as it was for that.
        with contextlib.suppress(termios.error):  # the terminal has gone
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _say(text: str) -> None:
    print(f"plugframe: {text}", file=sys.stderr, flush=True)


def run(code: CodeType, module: ModuleType) -> None:
    """Run a script under the debugger: it stops at the first line, and where an exception that nobody caught came from.

    Raises:
        KeyboardInterrupt: if the debugger was quit, or asked to start again, which one rank cannot.
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
