"""Ranks of a script that `plugframe run` forks behave as ranks in fresh interpreters."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click  # noqa: F401 - as the command has
import pytest

from plugframe import UnsupportedError
from plugframe.hooks.launcher import Job
from plugframe.launch.forked import forks, shadowed, why_not_forkable
from plugframe_builtins.elastic.launcher import Elastic

METHODS = ("spawn", "fork")
PLUGFRAME = str(Path(sys.executable).with_name("plugframe"))

PLACE = """
import gc, json, logging, multiprocessing, os, random, signal, sys, threading, warnings
import numpy, torch
import beside
rank = os.environ["RANK"]
seen = {
    "argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__, "spec": str(__spec__),
    "process": multiprocessing.current_process().name, "stdin": sys.stdin.fileno(), "beside": beside.__file__,
    "main": sys.modules["__main__"].__dict__ is globals(), "threads": torch.get_num_threads(),
    "alive": [thread.name for thread in threading.enumerate()],
    "signals": [str(signal.getsignal(getattr(signal, name))) for name in ("SIGTERM", "SIGHUP", "SIGUSR1")],
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "logging": [logging.getLogger("torch.distributed.elastic").propagate, logging.getLogger().handlers],
    "filters": any("multi-threaded" in str(each) for each in warnings.filters),
    "group": [os.getpgid(0) == os.getpid(), os.getsid(0) == os.getpid()],
    "buffering": sys.stdout.line_buffering,
    "ignored": signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN,
    "product": (torch.ones(300, 300) @ torch.ones(300, 300)).sum().item(),
}
with open(f"seen-{rank}", "w") as file:
    json.dump([seen, [random.random(), numpy.random.rand(), torch.initial_seed()]], file)
"""

END = """
import atexit, os, sys, threading, time, weakref
rank = os.environ["RANK"]

class Thing:
    def __del__(self):
        os.write(log, b"deleted ")

log = os.open(f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
thing, other = Thing(), Thing.__new__(type("Other", (), {}))
left_open = open(f"open-{rank}", "w")
left_open.write("written")
atexit.register(os.write, log, b"atexit ")
weakref.finalize(other, os.write, log, b"finalized ")
release = threading.Event()

def work():
    release.wait()
    os.write(log, b"thread ")

threading.Thread(target=work).start()
threading.Timer(0.2, release.set).start()
"""


def run(folder: Path, method: str, script: str, *arguments: str, devices: int = 2) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(script)
    (folder / "beside.py").write_text("")
    options = [f"--devices={devices}", "--accelerator=cpu", *([f"--launcher.start-method={method}"] if method else [])]
    command = [PLUGFRAME, "run", *options, "train.py", *arguments]
    before = signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # as nohup ignores SIGHUP: it stays so in the ranks
    try:
        return subprocess.run(command, cwd=folder, input="", capture_output=True, text=True, timeout=120, check=False)
    finally:
        signal.signal(signal.SIGQUIT, before)


def test_a_forked_rank_finds_what_a_fresh_one_does(tmp_path: Path) -> None:
    """Arguments, paths, the main module, signals, threads, logging and seeds; random numbers differ between ranks."""
    found: dict[str, list[Any]] = {}
    for method in METHODS:
        done = run(tmp_path, method, PLACE, "--epochs", "3")
        assert done.returncode == 0, done.stderr
        found[method] = [json.loads((tmp_path / f"seen-{rank}").read_text()) for rank in range(2)]
        (_, random_0), (_, random_1) = found[method]
        assert len({*random_0, *random_1}) == 6
    assert [seen for seen, _ in found["fork"]] == [seen for seen, _ in found["spawn"]]


@pytest.mark.parametrize("method", METHODS)
def test_all_that_happens_at_the_end_of_a_script(method: str, tmp_path: Path) -> None:
    """Threads are joined, exit handlers and finalizers run, objects are deleted, and open files are written."""
    done = run(tmp_path, method, END)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        first, *rest, last = (tmp_path / f"log-{rank}").read_text().split()
        assert (first, sorted(rest), last) == ("thread", ["atexit", "finalized"], "deleted")
        assert (tmp_path / f"open-{rank}").read_text() == "written"


FROZEN = """
import gc, os
left_open = open(f"open-{os.environ['RANK']}", "w")
left_open.write("written")
gc.freeze()
"""


@pytest.mark.parametrize("method", METHODS)
def test_files_that_the_garbage_collector_does_not_see_are_written(method: str, tmp_path: Path) -> None:
    """A script that calls gc.freeze() hides its open files from the garbage collector."""
    done = run(tmp_path, method, FROZEN)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"open-{rank}").read_text() for rank in range(2)] == ["written"] * 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("import os; os._exit(0)", 0, ""),
        ("import os; os._exit(0) if os.environ['RANK'] == '1' else None", 0, ""),
        ("import sys; sys.exit(['no', 'data'])", 1, "['no', 'data']"),
        (
            "import atexit, sys; atexit.register(lambda: print('at the end', file=sys.stderr)); sys.exit(3)",
            3,
            "at the end",
        ),
    ],
)
def test_exit_codes(method: str, script: str, code: int, said: str, tmp_path: Path) -> None:
    """A script may end in any way."""
    done = run(tmp_path, method, script)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "left running" not in done.stderr


def test_a_module_of_the_script_that_the_launcher_has_too(tmp_path: Path) -> None:
    """Forked ranks would import the launcher's: they start in fresh interpreters."""
    (tmp_path / "click.py").write_text("ours = True")
    command = (str(tmp_path / "train.py"),)
    assert shadowed(command) == "click"
    with pytest.raises(UnsupportedError, match="has a 'click'"):
        forks(Job(num_processes=1, command=command, forkable=True), "fork")
    done = run(tmp_path, "spawn", "import click; assert click.ours")
    assert done.returncode == 0, done.stderr
    done = run(tmp_path, "fork", "import click; assert click.ours")
    assert "start_method='fork' cannot start this script: the folder of the script has a 'click'" in done.stderr
    done = run(tmp_path, "", "import click; assert click.ours")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "os.environ['OMP_NUM_THREADS'] = '3'",
        'os.environ.setdefault("OMP_NUM_THREADS", "3")',
        'os.putenv("OMP_NUM_THREADS", "3")',
        'os.environ.update({"OMP_NUM_THREADS": "3"})',
    ],
)
def test_a_script_that_sets_what_torch_reads_at_import_is_not_forked(line: str, tmp_path: Path) -> None:
    """Its variables act as they do in a fresh interpreter."""
    command = (str(tmp_path / "train.py"),)
    (tmp_path / "train.py").write_text(f"import os\n{line}\nimport torch\n")
    job = Job(num_processes=1, command=command, forkable=True)
    assert why_not_forkable(job) == "the script uses OMP_NUM_THREADS, which is read when torch is imported"
    (tmp_path / "train.py").write_text("import os\nos.environ['TORCHELASTIC_RESTART_COUNT']\nprint('TORCH_LOGS')\n")
    assert why_not_forkable(job) is None


def test_a_module_is_looked_into_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package is found without importing it; folders and archives start in fresh interpreters."""
    (tmp_path / "site" / "package").mkdir(parents=True)
    (tmp_path / "site" / "package" / "__init__.py").write_text("raise SystemError")
    (tmp_path / "site" / "package" / "train.py").write_text("import os\nos.environ['MKL_NUM_THREADS'] = '1'\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    job = Job(num_processes=1, command=("-m", "package.train"), forkable=True)
    assert why_not_forkable(job) == "the script uses MKL_NUM_THREADS, which is read when torch is imported"
    assert (
        why_not_forkable(Job(num_processes=1, command=(str(tmp_path),), forkable=True))
        == "it is a folder or an archive"
    )


def test_a_variable_that_comes_too_late_is_told(tmp_path: Path) -> None:
    """A module of the script that sets one gets a warning with its line; what libraries set does not."""
    (tmp_path / "settings.py").write_text("import os\nos.environ['TORCH_LOGS'] = '+dynamo'\n")
    done = run(tmp_path, "", "import settings\nfrom plugframe import Lite\nLite().launch()\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("settings.py:2: PlugframeWarning: TORCH_LOGS is set after torch was imported") == 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"forkable": False}, "this process has run other code"),
        ({"debug_rank": 0}, "--debug-rank needs a process of its own"),
        ({"numa_binding": "node"}, "--numa-binding applies to new processes"),
    ],
)
def test_what_cannot_be_forked_is_refused(fields: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """With start_method='fork' the reason is an error, and without one the ranks start in fresh interpreters."""
    (tmp_path / "train.py").touch()
    job = Job(**{"num_processes": 1, "command": (str(tmp_path / "train.py"),), "forkable": True, **fields})
    with pytest.raises(UnsupportedError, match=f"{reason}.*Use 'spawn'"):
        Elastic(start_method="fork").launcher_launch(job)


COMPILES = """
import torch
from plugframe import Lite
lite = Lite()
lite.launch()
model = torch.nn.Linear(4, 1)
model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
model.compile()
lite.backward(model(torch.ones(2, 4)).sum())
optimizer.step()
lite.print("stepped")
"""


@pytest.mark.compile
@pytest.mark.slow
def test_a_forked_rank_compiles(tmp_path: Path) -> None:
    """torch.compile works, with its own processes."""
    done = run(tmp_path, "fork", COMPILES)
    assert (done.returncode, done.stdout) == (0, "stepped\n"), done.stderr
