"""Entry point of a rank that runs a script.

The launcher runs this file by its path, so that a rank imports neither the project nor anything heavy before
the script does, and the working directory cannot shadow the imports below. The script is executed directly, not
by ``runpy``, which restores the old ``__main__`` when the script ends: threads, exit handlers and multiprocessing
would then not find the script's objects.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from types import CodeType, ModuleType, TracebackType

#: Variable with the path of the error file that torch's agent reads after a failure.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
#: Name of the file next to the error file that holds the stack of a rank that crashed.
CRASH_FILE = "crash.txt"
#: Set while one rank is debugged: 1 for that rank, 0 for the others.
DEBUG = "PLUGFRAME_LAUNCH_DEBUG"
#: Exit code of a rank stopped by Ctrl-C (128 + SIGINT).
INTERRUPTED = 130

_HERE = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = os.path.dirname(_HERE) + os.sep


def main() -> None:
    """Run ``rank.py PARENT [-m] SCRIPT ARGUMENT…``."""
    if sys.path and os.path.abspath(sys.path[0]) == _HERE:
        del sys.path[0]  # after the imports above, which must resolve to the standard library
    parent, *command = sys.argv[1:]
    prepare(int(parent))
    sys.exit(run(command))


def run(command: list[str]) -> int:
    """Run ``[-m] SCRIPT ARGUMENT…`` in this process, report its error if it raises, and return the exit code."""
    debugged = _debugged()
    try:
        code, module = _load(command)
        sys.modules["__main__"] = module
        if debugged:
            from plugframe.launch.debug import run

            run(code, module)
        else:
            exec(code, module.__dict__)
    except SystemExit as leave:
        code_of_script = exit_code(leave)
        if code_of_script != 0:
            record(leave)
        if not isinstance(leave.code, int | None):
            print(leave.code, file=sys.stderr)
        return code_of_script
    except KeyboardInterrupt:
        return interrupted()
    except BaseException as error:  # noqa: BLE001 - the launcher reports any error
        _call_excepthook(error)
        if not record(error):
            sys.__excepthook__(type(error), error, strip(error.__traceback__))
        return 1
    return 0


def _debugged() -> bool:
    """Return whether this rank runs under the debugger; detach stdin and breakpoints of the others."""
    flag = os.environ.pop(DEBUG, "")
    if flag == "0":
        devnull = os.open(os.devnull, os.O_RDONLY)
        os.dup2(devnull, 0)
        os.close(devnull)
        sys.breakpointhook = lambda *args, **kwargs: None
    return flag == "1"


def interrupted() -> int:
    """Return the exit code after Ctrl-C, which may arrive twice. The launcher prints one line for all ranks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.last_value = sys.exc_info()[1]
    return INTERRUPTED


def prepare(parent: int) -> None:
    """Tie the lifetime of this process to its launcher, and write a stack to a file if it crashes."""
    die_with_parent(parent)
    if os.environ.get(ERROR_FILE):
        crash = os.path.join(os.path.dirname(os.environ[ERROR_FILE]), CRASH_FILE)
        # A descriptor, not a file object: it stays open until the very end of the process.
        faulthandler.enable(os.open(crash, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            # One write per line: under -u or PYTHONUNBUFFERED the lines of several ranks are interleaved.
            reconfigure(line_buffering=True, write_through=False)


def die_with_parent(parent: int) -> None:
    """Kill this process when the launcher ends, for any reason.

    Uses SIGKILL, because a rank blocked in a collective never runs a Python signal handler.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # the launcher ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def record(error: BaseException) -> bool:
    """Write `error` to the rank's error file, in torch's format with additional fields.

    Exit handlers find it in ``sys.last_value``, as after an error that the interpreter handles.

    Returns:
        False if the rank has no error file, because it was started manually.
    """
    sys.last_value = error
    path = os.environ.get(ERROR_FILE)
    if not path:
        return False
    now = time.time()
    stack, said = formatted(error), ""
    if isinstance(error, SystemExit):
        stack, said = [], "" if isinstance(error.code, int | None) else str(error.code)
    data = {
        "message": {
            "message": one_line(error),
            "extraInfo": {"py_callstack": "".join(stack), "timestamp": str(int(now))},
        },
        "rank": int(os.environ.get("RANK", "-1")),
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "time": now,
        "exit_code": exit_code(error),
        "said": said,
        "types": [kind.__name__ for kind in type(error).__mro__],
        "step": _step(),
        "blamed": getattr(error, "blamed", None),
    }
    # Replace atomically: the launcher may read at any time, and a rank may be killed at any time.
    draft = f"{path}.{os.getpid()}"
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(data, file)
    os.replace(draft, path)
    return True


def _step() -> int:
    """Return the number of optimizer steps made; 0 before the first, or without optimizers."""
    optimizers = sys.modules.get("plugframe.adopt.optimizer")
    return optimizers.steps_made() if optimizers is not None else 0


def one_line(error: BaseException) -> str:
    """Return the type and the first line of the message: ``ValueError: message``."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return traceback.format_exception_only(type(error), error)[0].splitlines()[0]


def formatted(error: BaseException) -> list[str]:
    """Return the traceback from the user's frames on; for a `PlugframeError`, with the user's frames only.

    Python's position markers are dropped except in the last frame: they take as many lines as the code.
    """
    summary = traceback.TracebackException(type(error), error, strip(error.__traceback__))
    if any(kind.__name__ == "PlugframeError" for kind in type(error).__mro__):
        users = [frame for frame in summary.stack if not _is_internal(frame.filename)]
        summary.stack = traceback.StackSummary.from_list(users or summary.stack)
    pieces = list(summary.format())
    frames = [index for index, piece in enumerate(pieces) if piece.startswith("  File ")]
    for index in frames[:-1]:
        pieces[index] = "".join(line for line in pieces[index].splitlines(keepends=True) if line.strip(" ~^\n"))
    return pieces


def _is_internal(file: str) -> bool:
    """Return whether a file belongs to plugframe, a package of built-ins, or pluggy."""
    module = sys.modules.get("plugframe.utils.own_packages")
    names = ("pluggy", *(module.own_packages() if module is not None else ()))
    packages = [sys.modules[name] for name in names if name in sys.modules]
    folders = [folder + os.sep for package in packages for folder in getattr(package, "__path__", ())]
    return file.startswith((_PACKAGE, *folders))


def strip(stack: TracebackType | None) -> TracebackType | None:
    """Return `stack` without the leading frames of this package."""
    shorter = _after(stack, _HERE + os.sep)
    return _after(shorter, _PACKAGE) or shorter


def _after(stack: TracebackType | None, folder: str) -> TracebackType | None:
    while stack is not None and stack.tb_frame.f_code.co_filename.startswith(folder):
        stack = stack.tb_next
    return stack


def exit_code(error: BaseException) -> int:
    """Return Python's exit code for an uncaught `error`."""
    if not isinstance(error, SystemExit):
        return 1
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def _call_excepthook(error: BaseException) -> None:
    """Call an excepthook the script has set, without its output: the launcher prints the traceback."""
    hook = sys.excepthook
    if hook is sys.__excepthook__:
        return
    stderr, sys.stderr = sys.stderr, io.StringIO()
    try:
        hook(type(error), error, strip(error.__traceback__))
    except Exception as failure:  # noqa: BLE001 - as Python does, which prints it and continues
        print(f"sys.excepthook failed: {one_line(failure)}", file=stderr)
    finally:
        sys.stderr = stderr


def _load(command: list[str]) -> tuple[CodeType, ModuleType]:
    """Return the code to run and its ``__main__`` module; set the arguments and path as Python does."""
    safe_path = sys.flags.isolated or getattr(sys.flags, "safe_path", False)
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path[:0] = [] if safe_path else [os.getcwd()]
        spec = find_spec(command[1])
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{command[1]}.__main__")
        code, module = _load_spec(spec, command[1])
        sys.argv[0] = module.__file__ or command[1]
        return code, module
    sys.argv = command
    path = os.path.abspath(command[0])
    if is_container(path):
        sys.path.insert(0, command[0])
        return _load_spec(PathFinder.find_spec("__main__", [path]), path)
    sys.path[:0] = [] if safe_path else [os.path.dirname(os.path.realpath(path))]
    module = ModuleType("__main__")
    module.__dict__.update(__file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))
    with open(path, "rb") as file:
        return compile(file.read(), path, "exec", dont_inherit=True), module


def _load_spec(spec: ModuleSpec | None, name: str) -> tuple[CodeType, ModuleType]:
    get_code = getattr(spec.loader, "get_code", None) if spec is not None else None
    code = get_code(spec.name) if spec is not None and get_code is not None else None
    if spec is None or code is None:
        raise ModuleNotFoundError(f"No module named {name!r} that can be executed")
    module = ModuleType("__main__")
    module.__dict__.update(
        __file__=spec.origin,
        __cached__=spec.cached,
        __loader__=spec.loader,
        __package__=spec.parent,
        __spec__=spec,
    )
    return code, module


def is_container(path: str) -> bool:
    """Return whether a path is a folder or an archive with a ``__main__.py``, rather than a script."""
    if os.path.isdir(path):
        return True
    if path.endswith(".py"):
        return False
    import zipfile

    return zipfile.is_zipfile(path)


if __name__ == "__main__":
    main()
