"""A process killed while it saves leaves an intact checkpoint, the old one or the new one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from paths import HELPERS

# One process imports torch and forks the victims: starting one for each kill would cost seconds each.
_VICTIMS = """
import itertools, json, os, random, select, signal, sys
os.environ["OMP_NUM_THREADS"] = "1"  # a forked child would wait for threads it does not have
sys.path.insert(0, TESTS)
import torch
from checkpoint_trees import plugin

FOLDER, checkpoint = TARGET, plugin()
PATH = os.path.join(FOLDER, "last.ckpt")

def save(version, numel):
    state = {"model": {"w": torch.full((numel,), float(version)), "b": torch.tensor(version)}, "version": version}
    checkpoint.checkpoint_save(path=PATH, state=state, info={}, wait=True)

def version():
    state = checkpoint.checkpoint_load(path=PATH, trusted=False, lazy=False)
    found = state["version"]
    assert state["model"]["b"] == found and (state["model"]["w"] == found).all(), "a mixture was loaded"
    return found

def killed_at_random():
    ready, tell = os.pipe()
    victim = os.fork()
    if victim == 0:
        number = 0
        while True:
            save(number % 2, 4_000_000)
            os.write(tell, b".")
            number += 1
    os.read(ready, 1)
    select.select([], [], [], random.uniform(0, 0.1))
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    return version()

def die_at_line(wanted):
    seen = 0
    def trace(frame, event, argument):
        nonlocal seen
        if not frame.f_code.co_filename.endswith(("atomic.py", "behind.py", "writer.py", "checkpoint.py")):
            return None
        seen += event == "line"
        if seen == wanted:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    save(1, 100)
    os._exit(0)

def killed_at_lines(step):
    for wanted in itertools.count(1, step):
        save(0, 100)
        victim = os.fork()
        if victim == 0:
            die_at_line(wanted)
        if os.waitpid(victim, 0)[1] == 0:
            return
        yield version(), len(os.listdir(FOLDER)) - 1

save(0, 100)
random_kills = [killed_at_random() for _ in range(5)]
line_kills = list(killed_at_lines(5))
save(0, 100)
print(json.dumps({"random": random_kills, "lines": line_kills, "left": os.listdir(FOLDER)}))
"""


def test_a_killed_save_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, run_python: Callable[[str], str]) -> None:
    """Killed at random moments and at every few lines: one version loads, and the next save removes leftovers."""
    code = _VICTIMS.replace("TESTS", repr(str(HELPERS))).replace("TARGET", repr(str(tmp_path)))
    found = json.loads(run_python(code))
    assert len(found["random"]) == 5
    assert set(found["random"]) <= {0, 1}
    assert len(found["lines"]) > 30
    # The old one until the rename, the new one from then on; at most one half-written file at a time.
    versions = [version for version, _ in found["lines"]]
    assert versions == sorted(versions)
    assert set(versions) == {0, 1}
    assert {left for _, left in found["lines"]} == {0, 1}
    assert found["left"] == ["last.ckpt"]
