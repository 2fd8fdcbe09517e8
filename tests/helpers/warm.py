"""Run commands in processes that fork from one that has imported torch and plugframe: a drop-in for `subprocess`.

`run` and `Popen` take ``plugframe ...`` and ``python ...`` commands, with the arguments of `subprocess` that the tests
use, and save the two to four seconds of CPU that an interpreter spends on imports. What differs from a new interpreter
is that the modules in `PRELOADED` are there from the beginning, and that there are frames below the script's: tests of
imports, of start-up, of what torch reads from the environment when it is imported, or of the end of an interpreter
start real ones.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.util
import multiprocessing.process
import os
import pickle
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

#: Imported before the fork, in this order.
PRELOADED = (
    "plugframe.testing.preload",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.run",
    "plugframe.cli.run",
    "plugframe.cli.start",
    "plugframe.launch.elastic",
    "plugframe.launch.rank",
)

#: Variables that an interpreter reads when it starts and that have an effect here, or none that a test sees.
_READ_AT_START = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "PYTHONHASHSEED"}

_server: Server | None = None


class Server:
    """The process that has imported everything; commands fork from it.

    Attributes:
        pid: its process id.
    """

    def __init__(self) -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PLUGFRAME_", "PYTEST_"))}
        # Named as a fork server, which outlives a test by design: see `plugframe.testing.leftovers`.
        code = "import sys; from warm import serve_forkserver; serve_forkserver(int(sys.argv[1]))"
        # Not the path of the test that happens to come first: each command has its own.
        path = str(Path(__file__).parent)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(there.fileno())],
            env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": "/tmp"},
            cwd="/",
            pass_fds=[there.fileno()],
            start_new_session=True,
        )
        there.close()
        self.pid = self._process.pid
        self._socket = here
        self._lock = threading.Lock()

    def start(self, request: Mapping[str, Any], streams: Sequence[int]) -> tuple[int, int]:
        """Fork a command, and return its process id and the descriptor from which its exit code is read."""
        here, there = socket.socketpair()
        data = pickle.dumps(dict(request))
        with self._lock:
            socket.send_fds(self._socket, [len(data).to_bytes(8, "big")], [*streams, there.fileno()])
            there.close()
            for start in range(0, len(data), 1 << 15):
                self._socket.send(data[start : start + (1 << 15)])
        pid = here.recv(8)
        if not pid:
            raise RuntimeError("the process that commands fork from is gone")
        return int.from_bytes(pid, "big"), here.detach()

    def close(self) -> None:
        """End it, with the test session."""
        self._socket.close()
        self._process.wait(30)


def server() -> Server:
    """Return the running server of this process; start it first."""
    global _server
    if _server is None:
        _server = Server()
        atexit.register(_server.close)
    return _server


class Popen:
    """A command that runs; the part of `subprocess.Popen` that the tests use."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: Any = None,
        stderr: Any = None,
        text: bool = False,
        start_new_session: bool = False,
    ) -> None:
        self.args = [str(word) for word in command]
        self.returncode: int | None = None
        environment = dict(os.environ if env is None else env)
        unknown = {n for n in environment if n.startswith("PYTHON")} - _READ_AT_START - set(os.environ)
        if unknown:
            raise ValueError(f"An interpreter reads {sorted(unknown)} when it starts: use subprocess.")
        request = {
            "words": _words(self.args),
            "environment": environment,
            "folder": str(cwd or os.getcwd()),
            "session": start_new_session,
        }
        self.stdout, out = _stream(stdout, 1, text)
        if stderr == subprocess.STDOUT:
            self.stderr, err = None, os.dup(out)
        else:
            self.stderr, err = _stream(stderr, 2, text)
        try:
            self.pid, self._end = server().start(request, [out, err])
        finally:
            os.close(out)
            os.close(err)

    def poll(self) -> int | None:
        """Return the exit code, None while the command runs."""
        if self.returncode is None and select.select([self._end], [], [], 0)[0]:
            self._read()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, and return the exit code."""
        if self.returncode is None:
            if not select.select([self._end], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._read()
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Read everything, close the streams, and wait for the end."""
        until = None if timeout is None else time.monotonic() + timeout
        texts: dict[int, Any] = {}
        readers = [
            threading.Thread(target=lambda k=k, s=s: texts.update({k: s.read()}), daemon=True)
            for k, s in enumerate((self.stdout, self.stderr))
            if s is not None
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if until is None else max(until - time.monotonic(), 0))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.close()
        self.wait(None if until is None else max(until - time.monotonic(), 0.1))
        return texts.get(0), texts.get(1)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the command has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Popen:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
        self.wait()

    def close(self) -> None:
        """Close the streams."""
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()

    def __del__(self) -> None:
        if self.returncode is None and hasattr(self, "_end"):
            os.close(self._end)

    def _read(self) -> None:
        code = os.read(self._end, 8)
        os.close(self._end)
        self.returncode = int.from_bytes(code, "big", signed=True) if code else -signal.SIGKILL


def run(
    command: Sequence[str],
    *,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **settings: Any,
) -> subprocess.CompletedProcess[Any]:
    """Run a command to its end; as `subprocess.run`."""
    if capture_output:
        settings |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = Popen(command, **settings)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(30)
        raise
    finally:
        process.close()
    done = subprocess.CompletedProcess(process.args, process.wait(), out, err)
    if check:
        done.check_returncode()
    return done


def _words(command: list[str]) -> list[str]:
    """Return the words behind ``python``."""
    name = Path(command[0]).name
    if command[0] == sys.executable or name in ("python", "python3"):
        words = command[1:]
        while words and words[0] in ("-u", "-B"):
            words = words[1:]
        if words and (words[0] in ("-c", "-m") or not words[0].startswith("-")):
            return words
    elif name in ("plugframe", "torchrun"):
        return ["-m", {"torchrun": "torch.distributed.run"}.get(name, name), *command[1:]]
    raise ValueError(f"{command} is neither a script, -c or -m of this interpreter, nor plugframe: use subprocess.")


def _stream(wanted: Any, default: int, text: bool) -> tuple[IO[Any] | None, int]:
    """Return what the test reads from, and the descriptor the command writes to."""
    if wanted is None:
        return None, os.dup(default)
    if wanted == subprocess.DEVNULL:
        return None, os.open(os.devnull, os.O_WRONLY)
    if wanted != subprocess.PIPE:
        return None, os.dup(wanted if isinstance(wanted, int) else wanted.fileno())
    ours, theirs = os.pipe()
    return (os.fdopen(ours, "r") if text else os.fdopen(ours, "rb")), theirs


# ---------------------------------------------------------------- in the server


def serve_forkserver(descriptor: int) -> None:
    """Import everything, then fork a process per request until the other side closes."""
    import preloaded  # noqa: F401 - for its imports, while its folder is in the path

    sys.path.remove(str(Path(__file__).parent))
    os.environ.pop("PYTHONPATH")
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    requests = socket.socket(fileno=descriptor)
    waiting: dict[int, tuple[int, socket.socket]] = {}  # by pidfd
    while True:
        ready, _, _ = select.select([requests, *waiting], [], [])
        for number in set(ready) & set(waiting):
            pid, end = waiting.pop(number)
            os.close(number)
            _, status = os.waitpid(pid, 0)
            with end:
                end.send(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
        if requests in ready:
            head, descriptors, _, _ = socket.recv_fds(requests, 8, 3)
            if not head:
                return
            data = b""
            while len(data) < int.from_bytes(head, "big"):
                data += requests.recv(1 << 15)
            *streams, answer = descriptors
            end = socket.socket(fileno=answer)
            pid = os.fork()
            if not pid:
                for number, (_, other) in waiting.items():
                    os.close(number)
                    other.close()
                requests.close()
                end.close()
                _be(pickle.loads(data), streams)
            end.send(pid.to_bytes(8, "big"))
            waiting[os.pidfd_open(pid)] = pid, end
            for number in streams:
                os.close(number)


def _be(request: dict[str, Any], streams: list[int]) -> None:
    """Become the command, and end as an interpreter does."""
    code = 1
    try:
        _set_up(request, streams)
        code = _call(request["words"])
    except BaseException:  # noqa: BLE001 - nothing else would print it
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
        except BaseException:  # noqa: BLE001 - as an interpreter does
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def _set_up(request: dict[str, Any], streams: list[int]) -> None:
    import torch

    if request["session"]:
        os.setsid()
    atexit._clear()
    null = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in zip((0, 1, 2), (null, *streams), strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    os.environ.clear()
    os.environ.update(request["environment"])
    if "PYTHONUNBUFFERED" in os.environ:
        sys.stdout.reconfigure(write_through=True)
    os.chdir(request["folder"])
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()  # where spawned processes look for the script
    sys.path[:0] = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    tempfile.tempdir = None
    random.seed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))


def _call(words: list[str]) -> int:
    what, *rest = words
    main = types.ModuleType("__main__")
    # multiprocessing names it so as well.
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    main.__dict__["__builtins__"] = __builtins__
    try:
        if what == "-m":
            sys.path[:0] = [os.getcwd()]
            spec = importlib.util.find_spec(rest[0])
            if spec is not None and spec.submodule_search_locations is not None:
                spec = importlib.util.find_spec(f"{rest[0]}.__main__")
            assert spec is not None, f"no module {rest[0]}"
            main.__file__, main.__spec__, main.__package__ = spec.origin, spec, spec.parent
            sys.argv = [str(spec.origin), *rest[1:]]
            exec(spec.loader.get_code(spec.name), main.__dict__)  # type: ignore[union-attr]
        elif what == "-c":
            sys.argv, sys.path[:0] = ["-c", *rest[1:]], [""]
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        else:
            sys.argv, sys.path[:0] = [what, *rest], [os.path.dirname(os.path.abspath(what))]
            main.__file__ = os.path.abspath(what)
            exec(compile(Path(what).read_bytes(), what, "exec"), main.__dict__)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return (stop.code or 0) & 0xFF
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001 - as an interpreter does
        code = _excepthook(error)
        if code is None and isinstance(error, KeyboardInterrupt):
            sys.stderr.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 1 if code is None else code
    return 0


def _excepthook(error: BaseException) -> int | None:
    """Call ``sys.excepthook`` without the frames of this module; return an exit code that it raises."""
    skip = error.__traceback__
    while skip is not None and skip.tb_frame.f_code.co_filename == __file__:
        skip = skip.tb_next
    error = error.with_traceback(skip)
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, skip
    try:
        sys.excepthook(type(error), error, skip)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    return None
