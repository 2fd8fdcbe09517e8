"""Entry point of a rank that multiprocessing starts to run a function."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plugframe.errors import OrderError
from plugframe.launch import orphan_reaper, rank

UNGUARDED = "The script launches ranks while a rank imports it: move the launch under `if __name__ == '__main__':`."
#: Name of the file next to the error file that marks that the function has returned.
DONE_FILE = "done"


def run_function(parent: int, function: Callable[..., Any], args: tuple[Any, ...]) -> bytes | None:
    """Call ``function(*args)``; return the pickled result on rank 0, None on the others.

    The result is pickled here by value: a pickling error is then reported like one of the function, and tensors need no
    living process until they are received.
    """
    os.setpgid(0, 0)  # its own group, like a script's rank, to kill its child processes with it
    begin(parent)
    try:
        result = _call(function, args)
        payload = _pickled(result) if os.environ["RANK"] == "0" else None
    except SystemExit as leave:
        rank.record(leave)
        raise
    except KeyboardInterrupt:
        sys.exit(rank.interrupted())
    except BaseException as error:  # noqa: BLE001 - the launcher reports any error
        rank.record(error)
        sys.exit(1)
    mark_done()
    return payload


def _call(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return function(*args)
    except SystemExit as leave:
        if rank.exit_code(leave) != 0:
            raise
        return None  # torch's agent would wait forever for the result of a function that exits


def _pickled(result: Any) -> bytes:
    try:
        return pickle.dumps(result)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(f"The function's return value cannot be sent to the launcher: {error}") from None


def begin(parent: int) -> None:
    """Prepare a process that multiprocessing has started to be a rank of the launcher `parent`."""
    orphan_reaper.close_inherited_pipes()
    # A forked rank inherits the launcher's handlers. What is ignored stays so (nohup).
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    rank.prepare(parent)
    _limit_threads()


def mark_done() -> None:
    """Tell the launcher that this rank has done its work."""
    (Path(os.environ[rank.ERROR_FILE]).parent / DONE_FILE).touch()


def _limit_threads() -> None:
    """Apply OMP_NUM_THREADS in a forked rank, where torch has already read its environment."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit():
        torch.set_num_threads(int(threads))


def refuse_while_importing() -> None:
    """Exit if this process is a rank that is still importing its script.

    multiprocessing imports the script as ``__mp_main__``, and makes it ``__main__`` only afterwards.
    """
    spawned = sys.modules.get("__mp_main__")
    if spawned is not None and spawned is not sys.modules["__main__"]:
        rank.record(OrderError(UNGUARDED))
        raise SystemExit(1)
