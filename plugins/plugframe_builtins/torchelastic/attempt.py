"""One prefix for the ranks of one attempt, in a store that outlives attempts."""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from plugframe.errors import EnvironmentMismatchError
from plugframe.hooks.world import World

POLL_S = 0.01


def only_this_attempt(store: Any, world: World, *, timeout_s: float) -> Any:
    """Return `store` behind a prefix that the ranks now alive agree on, new for each call.

    torchrun's agent keeps its store when it starts the ranks again, so addresses of dead ranks are still in it
    (https://github.com/pytorch/pytorch/issues/135712). ``TORCHELASTIC_RESTART_COUNT`` cannot tell attempts
    apart: it differs between nodes. So each rank comes with a word of its own, and follows the rank 0 that
    answers to it, which a dead one cannot do.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    lobby = PrefixStore("plugframe/attempt", store)
    _take_place(lobby, world.global_rank)
    prefix = _answer(lobby, world, timeout_s) if world.global_rank == 0 else _ask(lobby, world, timeout_s)
    return PrefixStore(f"plugframe/{prefix}", store)


def _take_place(lobby: Any, rank: int) -> None:
    """Refuse a second process with the variables of one rank: a program that the rank has started, and handed them."""
    host, key = socket.gethostname(), f"process/{rank}"
    me = f"{host} {os.getpid()}"
    holder: str = lobby.compare_set(key, "", me).decode()
    if holder == me:
        return
    other, _, pid = holder.rpartition(" ")
    if other == host and _lives(int(pid)):
        raise EnvironmentMismatchError(
            f"Rank {rank} of this job is process {pid}, and this is another, {os.getpid()}, with its variables: start "
            "it without them ('env -u RANK -u LOCAL_RANK python …'), or while the rank has its Lite: it sees to that."
        )
    lobby.set(key, me)  # of the attempt before


def _lives(pid: int) -> bool:
    try:
        if sys.platform == "linux":
            return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _ask(lobby: Any, world: World, timeout_s: float) -> str:
    word = uuid4().hex
    lobby.set(f"come/{world.global_rank}", word)
    lobby.wait([f"answer/{word}"], timedelta(seconds=timeout_s))
    prefix: str = lobby.get(f"answer/{word}").decode()
    lobby.set(f"heard/{prefix}/{world.global_rank}", "")
    return prefix


def _answer(lobby: Any, world: World, timeout_s: float) -> str:
    prefix = uuid4().hex
    answered: dict[int, str] = {}
    away = set(range(1, world.world_size))
    deadline = time.monotonic() + timeout_s
    while True:
        for rank in sorted(away):
            # The word is read before the receipt is looked for: a rank that has heard may come again, for its
            # next connection, and must not get this answer twice.
            word = lobby.get(f"come/{rank}").decode() if lobby.check([f"come/{rank}"]) else None
            if lobby.check([f"heard/{prefix}/{rank}"]):
                away.remove(rank)
            elif word is not None and answered.get(rank) != word:
                lobby.set(f"answer/{word}", prefix)
                answered[rank] = word
        if not away:
            return prefix
        if time.monotonic() > deadline:
            raise EnvironmentMismatchError(
                f"{len(away)} of {world.world_size} ranks did not come within {timeout_s:g} s, rank {min(away)} "
                "among them: see that they run and build as many Lite objects as rank 0."
            )
        time.sleep(POLL_S)
