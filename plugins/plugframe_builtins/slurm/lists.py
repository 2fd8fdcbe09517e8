"""Expand SLURM's compact lists: ``a[1-3,07],b2`` for hosts, ``2(x3),1`` for tasks on each node."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

from plugframe.errors import EnvironmentMismatchError

HOST = re.compile(r"(?:[^][,\s]|\[[^][]+\])+")
PART = re.compile(r"\[([^]]+)\]|([^[]+)")
RANGE = re.compile(r"(\d+)(?:-(\d+))?")
TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand_hosts(variable: str, text: str) -> Iterator[str]:
    """Yield the hosts of ``rack[1-2]n[01-03]``: leading zeros stay, the last bracket varies fastest.

    Raises:
        EnvironmentMismatchError: naming `variable`, the environment variable of `text`.
    """
    # A comma inside brackets separates ranges, any other separates hosts.
    for host in re.split(r",(?![^[]*\])", text):
        if not HOST.fullmatch(host):
            raise EnvironmentMismatchError(
                f"{variable}={text!r} is not a list of hosts: set MASTER_ADDR to the host of rank 0."
            )
        parts = [list(_numbers(variable, brackets)) if brackets else [plain] for brackets, plain in PART.findall(host)]
        yield from map("".join, product(*parts))


def _numbers(variable: str, text: str) -> Iterator[str]:
    for piece in text.split(","):
        match = RANGE.fullmatch(piece)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise EnvironmentMismatchError(
                f"{variable} holds the range {piece!r}, which is invalid: set MASTER_ADDR to the host of rank 0."
            )
        for number in range(int(match[1]), int(match[2] or match[1]) + 1):
            yield str(number).zfill(len(match[1]))


def expand_tasks(variable: str, text: str) -> Iterator[int]:
    """Yield the number of tasks of each node.

    Raises:
        EnvironmentMismatchError: naming `variable`, the environment variable of `text`.
    """
    for piece in text.split(","):
        match = TASKS.fullmatch(piece)
        if not match:
            raise EnvironmentMismatchError(
                f"{variable}={text!r} does not say how many tasks each node runs, as in 2(x3),1: start the "
                "script with srun."
            )
        yield from [int(match[1])] * int(match[2] or 1)
