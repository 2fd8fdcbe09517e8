"""A store prefix per attempt, for stores that outlive attempts."""

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
    """Return `store` behind a new prefix on which the ranks alive now agree.

    torchrun's agent keeps its store when it restarts the ranks, so addresses of dead ranks are still in it
    (https://github.com/pytorch/pytorch/issues/135712). ``TORCHELASTIC_RESTART_COUNT`` does not identify
    attempts: it differs between nodes. So each rank writes a random token, and takes the prefix from the rank 0 that
    answers with it, which a dead one cannot.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    lobby = PrefixStore("plugframe/attempt", store)
    _claim_rank(lobby, world.global_rank)
    prefix = _answer(lobby, world, timeout_s) if world.global_rank == 0 else _ask(lobby, world, timeout_s)
    return PrefixStore(f"plugframe/{prefix}", store)


def _claim_rank(lobby: Any, rank: int) -> None:
    """Raise for a second process with the variables of one rank, such as a program that the rank has started."""
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
    lobby.set(key, me)  # replaces that of an earlier attempt


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
            # The token is read before the acknowledgement is checked: a rank may return for its
            # next connection, and must not get the same answer twice.
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
