"""The functions that ranks run in the launcher contract suite; cheap to import."""

from __future__ import annotations

import glob
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

#: Variables of the job, and one of the launching process, to check that they reach the ranks.
VARIABLES = {"TESTING_MARK_OF_THE_JOB": "set", "TESTING_EMPTY": "", "TESTING_TEXT": "two words, 'ü' = \"漢\"\nline"}
INHERITED = {"TESTING_MARK_OF_THE_LAUNCHER": "inherited"}
EXIT_CODE = 7
WORDS = ("two words", "ü 漢", "", "--flag=1", "*")


def report(folder: str, *arguments: Any) -> dict[str, Any]:
    """Write a file with this rank's arguments and place, and return its content; all but rank 0 end a little later."""
    found = {
        "pid": os.getpid(),
        "arguments": list(arguments),
        "variables": {name: os.environ.get(name) for name in (*VARIABLES, *INHERITED)},
        **place(),
    }
    # By process: two ranks may have one number.
    write(folder, f"rank{found['rank']}-{os.getpid()}.json", found)
    if found["rank"] > 0:
        _wait(0.3, lambda: False)
    write(folder, f"ended{os.getpid()}.json", {"pid": os.getpid()})
    return found


def place() -> dict[str, Any]:
    """Form the job as a script would, and return this rank's place in it."""
    from plugframe import Lite
    from plugframe.testing.contracts.running import cpu_accelerator

    with Lite(accelerator=cpu_accelerator()) as lite:
        lite.launch()
        total = lite.all_reduce(1 + lite.global_rank, reduce_op="sum")
        return {
            "rank": lite.global_rank,
            "local_rank": lite.local_rank,
            "node_rank": lite.node_rank,
            "size": lite.world_size,
            "total": int(total),
        }


def leave(folder: str) -> None:
    """Leave with `EXIT_CODE` on the last rank, after the ranks have formed a job; the others wait for it."""
    mine = place()
    write(folder, f"pid{mine['rank']}.json", {"pid": os.getpid()})
    if mine["rank"] == mine["size"] - 1:
        sys.exit(EXIT_CODE)
    _wait(30, lambda: False)
    write(folder, f"survived{mine['rank']}.json", {"pid": os.getpid()})


def speak(word: str) -> None:
    """Print a word."""
    print(word, flush=True)


def fail(folder: str, num_ranks: str) -> None:
    """Raise on the first rank once all have started; the others run until they are stopped."""
    mine = _early_rank(folder)
    write(folder, f"pid{mine}.json", {"pid": os.getpid()})
    if mine == 0:
        _wait(5, lambda: len(glob.glob(os.path.join(folder, "pid*.json"))) >= int(num_ranks))
        raise ValueError("the boiler has burst")
    _wait(30, lambda: False)
    write(folder, f"survived{mine}.json", {"pid": os.getpid()})


def _wait(most_s: float, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + most_s
    while time.monotonic() < deadline and not until():
        time.sleep(0.02)


def _early_rank(folder: str) -> int:
    """Return a rank in order of arrival: the variables with the rank depend on the launcher."""
    for number in range(1000):
        try:
            os.mkdir(os.path.join(folder, f"place{number}"))
        except FileExistsError:
            continue
        return number
    raise AssertionError("more than 1000 ranks")


def write(folder: str, name: str, content: dict[str, Any]) -> None:
    """Write a file atomically."""
    draft = os.path.join(folder, f".{name}.{os.getpid()}")
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.replace(draft, os.path.join(folder, name))


if __name__ == "__main__":
    kind, where, *words = sys.argv[1:]
    calls: dict[str, Callable[..., Any]] = {"report": report, "fail": fail, "leave": leave, "speak": speak}
    calls[kind](where, *words)
