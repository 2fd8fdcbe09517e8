"""What surrounds a function in a rank that multiprocessing started."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import Any

from plugframe.errors import OrderError
from plugframe.launch import orphan_reaper, rank

UNGUARDED = "The script starts ranks while a rank imports it: put what starts them under `if __name__ == '__main__':`."
#: Name of a file beside the error file, there once the function has returned.
DONE_FILE = "done"


def run_function(parent: int, function: Callable[..., Any], args: tuple[Any, ...]) -> bytes | None:
    """Call ``function(*args)``; return the pickled result on rank 0, None on the others.

    Pickled here and by value: an error is then told like any other of the function, and tensors need no
    process to live on until somebody has received them.
    """
    orphan_reaper.let_go()
    os.setpgid(0, 0)  # as a script's rank has it: what it starts can be ended with it
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_DFL)  # a forked rank has the launcher's handlers
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rank.prepare(parent)
    _limit_threads()
    try:
        result = _call(function, args)
        payload = _pickled(result) if os.environ["RANK"] == "0" else None
    except SystemExit as leave:
        rank.record(leave)
        raise
    except KeyboardInterrupt:
        rank.leave_interrupted()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the launcher tells it
        rank.record(error)
        sys.exit(1)
    with open(os.path.join(os.path.dirname(os.environ[rank.ERROR_FILE]), DONE_FILE), "w", encoding="utf-8"):
        return payload


def _call(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return function(*args)
    except SystemExit as leave:
        if rank.exit_code(leave) != 0:
            raise
        return None  # torch's supervisor would wait for ever for the result of a function that exits


def _pickled(result: Any) -> bytes:
    try:
        return pickle.dumps(result)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(f"what the function returned cannot be sent to the launcher: {error}") from None


def _limit_threads() -> None:
    """Honour OMP_NUM_THREADS in a forked rank too, where torch has read its own environment long ago."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit():
        torch.set_num_threads(int(threads))


def refuse_while_importing() -> None:
    """End this process if it is a rank about to be started that still imports its script.

    multiprocessing imports the script as ``__mp_main__``, and makes that ``__main__`` only afterwards.
    """
    spawned = sys.modules.get("__mp_main__")
    if spawned is not None and spawned is not sys.modules["__main__"]:
        rank.record(OrderError(UNGUARDED))
        raise SystemExit(1)
