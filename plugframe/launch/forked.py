"""Entry point of a rank that is forked from the launcher to run a script.

The launcher has imported torch already, so N ranks cost one import. Differences between a forked process and a fresh
interpreter that a script could notice are removed before it runs, and at its end.
"""

from __future__ import annotations

import atexit
import gc
import io
import multiprocessing
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType

from plugframe.errors import UnsupportedError
from plugframe.hooks.launcher import Job
from plugframe.launch import rank
from plugframe.launch.function import begin, mark_done
from plugframe.launch.import_variables import mentioned_in, warn_of_assignments


def make_entry_point(command: Sequence[str], undo: Callable[[], None]) -> Callable[[int], None]:
    """Return the function that torch's agent calls in a forked rank.

    Args:
        command: `Job.command`.
        undo: restores what the launcher has changed in its process for itself.
    """

    def run_script(parent: int) -> None:
        os.setsid()  # as torch starts a script: its own process group, and no terminal that could stop it
        undo()
        num_frozen = _reset_process_state()
        begin(parent)
        warn_of_assignments()
        code = _finish(rank.run(list(command)), num_frozen)
        if code != 0:
            sys.exit(code)
        mark_done()

    return run_script


def preload() -> None:
    """Import what the first optimizer of each rank would import: a second of torch's compiler (torch 2.13)."""
    import torch

    torch.optim.SGD([torch.zeros(1, requires_grad=True)])


def forks(job: Job, start_method: str | None) -> bool:
    """Return whether the ranks of a script are forked from this process.

    Args:
        start_method: ``"fork"``, ``"spawn"``, or None to fork if possible.

    Raises:
        UnsupportedError: if ``"fork"`` is not possible.
    """
    if start_method == "spawn":
        return False
    reason = why_not_forkable(job)
    if reason is None:
        if job.num_processes > 1:
            preload()
        name = shadowed(job.command)
        if name is not None:
            reason = f"the folder of the script has a {name!r}, and this process has imported another one"
    if reason is not None and start_method == "fork":
        raise UnsupportedError(f"start_method='fork' cannot start this script: {reason}. Use 'spawn'.")
    return reason is None


def why_not_forkable(job: Job) -> str | None:
    """Return why the ranks of a script cannot be forked from this process; None if they can."""
    if sys.platform != "linux":
        return "it needs Linux"
    if job.debug_rank is not None:
        return "--debug-rank needs a process of its own"
    if job.numa_binding is not None:
        return "--numa-binding applies to new processes"
    if not job.forkable:
        return "this process has run other code, or its accelerator does not work in forked processes"
    if job.command[0] != "-m" and rank.is_container(job.command[0]):
        return "it is a folder or an archive"
    variable = mentioned_in(job.command)
    if variable is not None:
        return f"the script uses {variable}, which is read when torch is imported"
    return None


def shadowed(command: Sequence[str]) -> str | None:
    """Return a module in the folder of the script that this process has imported from elsewhere; None without one.

    A fresh interpreter would import the one of the script.
    """
    folder = os.getcwd() if command[0] == "-m" else os.path.dirname(os.path.realpath(command[0]))
    try:
        names = {name.partition(".")[0] for name in os.listdir(folder)}
    except OSError:
        return None
    for name in sorted(names & sys.modules.keys()):
        file = getattr(sys.modules[name], "__file__", None)
        if name == "__main__" or (file is not None and os.path.realpath(file).startswith(folder + os.sep)):
            continue
        if any(os.path.isfile(os.path.join(folder, *parts)) for parts in ((f"{name}.py",), (name, "__init__.py"))):
            return name
    return None


def _reset_process_state() -> int:
    """Remove what a script could see of the launcher; return how many objects are hidden from the garbage collector."""
    # Copies of the launcher's objects, such as the server of its store, must not be destroyed here.
    gc.freeze()
    # Private (Python 3.10 to 3.13): finalizers of the launcher's objects, such as its temporary folder.
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.detach()
    multiprocessing.current_process().name = "MainProcess"
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - multiprocessing has replaced it by an empty one
    program = os.path.dirname(os.path.abspath(sys.argv[0]))
    if sys.path and sys.path[0] in ("", os.getcwd(), program):
        del sys.path[0]  # of the launcher's own program
    # Ranks have their own random numbers until they are seeded. Python's generator is seeded by itself.
    sys.modules["torch"].default_generator.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
    return gc.get_freeze_count()


def _finish(code: int, num_frozen: int) -> int:
    """Do what an interpreter does at its end, and multiprocessing does not; return the exit code."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # joins the script's threads
        atexit._run_exitfuncs()
    except SystemExit as leave:
        code = code or rank.exit_code(leave)
    # The objects of the script are deleted, and what is open is written. A file is flushed before it is deleted: in a
    # reference cycle its buffer may be closed before it.
    _flush_open_files()
    sys.modules["__main__"] = ModuleType("__main__")
    gc.collect()
    if gc.get_freeze_count() > num_frozen:  # the script has called gc.freeze(), which hides its files too
        gc.disable()
        gc.unfreeze()
    _flush_open_files()
    return code


def _flush_open_files() -> None:
    for opened in gc.get_objects():
        if issubclass(type(opened), (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)) and not opened.closed:
            try:
                opened.flush()
            except io.UnsupportedOperation:  # opened for reading
                continue
            except OSError as error:  # as Python does at its end
                print(f"Exception ignored in {opened!r}: {error}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
