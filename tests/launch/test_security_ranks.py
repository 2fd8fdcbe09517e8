"""Attacks of another user of the machine on the ranks of a job."""

from __future__ import annotations

import enum
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from plugframe.base import pack, unpack
from plugframe.errors import CollectiveMismatchError
from plugframe.hooks import Job
from plugframe.launch import supervise

NOBODY = 65534

#: Rank 1 lets an attacker try first, who has everything but what only the owner of the job can read.
ATTACKED = """
import os, sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

import plugframe_builtins._shared.torch_collective.fork
from plugframe import Lite
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins.torch_collective.collective import TorchCollective
from plugframe_builtins.torchelastic.environment import TorchElastic


class Evil:
    def __reduce__(self):
        return open, (sys.argv[1], "w")


def attack():
    os.setgroups([])
    os.setgid(%(nobody)d)
    os.setuid(%(nobody)d)
    meeting = os.environ.pop("PLUGFRAME_JOB_STORE", None)
    os.environ.pop("PLUGFRAME_JOB_TOKEN", None)
    if meeting is not None:
        try:
            open(meeting)
        except PermissionError:
            pass
        else:
            os._exit(3)
    hooks = SimpleNamespace(
        environment_store=TorchElastic().environment_store, accelerator_collective_backend=lambda: "gloo"
    )
    world = World(global_rank=1, local_rank=1, world_size=2, local_world_size=2)
    context = Context(world=world, device=torch.device("cpu"), hooks=hooks, names={}, timeout_s=5.0)
    collective = TorchCollective()
    try:
        collective.collective_setup(context=context)
        # Ranks with different versions send their version lists as objects.
        collective.collective_all_gather(tensor=torch.zeros(8, dtype=torch.int32), group=None, sync_grads=False)
        collective.collective_all_gather_object(obj=Evil(), group=None)
    except BaseException as error:
        print("attack failed:", type(error).__name__, flush=True)
    os._exit(0)


if os.environ["RANK"] == "1":
    attacker = os.fork()
    if attacker == 0:
        attack()
    _, status = os.waitpid(attacker, 0)
    assert status == 0, status
lite = Lite(accelerator="cpu", devices=2, strategy="ddp")
print("rank", lite.global_rank, "got", lite.broadcast("hello" if lite.global_rank else None, src=1), flush=True)
lite.teardown()
"""


class _Code(enum.IntEnum):
    """An object that must be pickled."""

    RUN = 1


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.ranks
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become another user")
def test_another_user_cannot_take_the_place_of_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The ranks of one node use a store only the job's owner can reach: an attacker's pickle is never loaded."""
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "code-ran"
    Path("train.py").write_text(ATTACKED % {"nobody": NOBODY}, encoding="utf-8")
    supervise(Job(num_processes=2, command=("train.py", str(marker))))
    out = capfd.readouterr().out
    assert not marker.exists()
    assert "attack failed" in out
    assert {"rank 0 got hello", "rank 1 got hello"} <= set(out.splitlines())


@pytest.mark.ranks
def test_the_ranks_of_a_node_meet_in_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is a file in a folder of mode 0700, the token is new for each job, and both are removed at the end."""
    monkeypatch.chdir(tmp_path)
    script = """
import json, os, sys
path = os.environ["PLUGFRAME_JOB_STORE"]
folders = [path]
while os.path.dirname(folders[-1]) != sys.argv[1]:
    folders.append(os.path.dirname(folders[-1]))
with open("seen-" + os.environ["RANK"], "w") as file:
    json.dump([path, oct(os.stat(folders[-1]).st_mode & 0o777), os.environ["PLUGFRAME_JOB_TOKEN"]], file)
"""
    Path("train.py").write_text(script, encoding="utf-8")
    temporary = os.environ["TMPDIR"]
    tokens = []
    for _ in range(2):
        supervise(Job(num_processes=2, command=("train.py", temporary)))
        seen = [json.loads(Path(f"seen-{rank}").read_text(encoding="utf-8")) for rank in (0, 1)]
        assert seen[0] == seen[1]
        path, mode, token = seen[0]
        assert mode == "0o700"
        assert not os.path.exists(path)
        tokens.append(token)
    assert tokens[0] != tokens[1]
    assert all(len(token) >= 32 for token in tokens)
    assert "PLUGFRAME_JOB_TOKEN" not in os.environ


PLAIN: list[Any] = [
    *(None, True, 1, -0.0, float("inf"), "ä\ud800", b"\0", (), [], {}, set(), frozenset({1})),
    {"a": [1, (2.5, None)], 3: {"b"}, (1, 2): torch.float16},
    torch.Size([1, 2]),
]


@pytest.mark.parametrize("obj", PLAIN, ids=repr)
def test_plain_objects_travel_without_a_pickle(obj: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built-in Python values are sent as JSON and come back equal, with the same type."""
    monkeypatch.setattr(pickle, "dumps", None)
    found = unpack(pack(obj, b"token"), b"other")
    assert (found, type(found)) == (obj, type(obj))


def test_tensors_travel_without_a_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of any dtype, also 0-d and empty ones, come back bitwise equal."""
    monkeypatch.setattr(pickle, "dumps", None)
    tensors = [torch.arange(6.0).view(2, 3), torch.tensor(7), torch.empty(0, 3), torch.ones(3, dtype=torch.bfloat16)]
    found = unpack(pack({"tensors": tensors}, b""), b"")["tensors"]
    for before, after in zip(tensors, found, strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


def test_other_objects_need_the_token_of_the_job(tmp_path: Path) -> None:
    """A pickle is loaded only if it is signed with the token."""
    assert unpack(pack(_Code.RUN, b"token"), b"token") is _Code.RUN
    shared = [1]
    twice = unpack(pack([shared, shared], b"token"), b"token")
    assert twice[0] is twice[1]
    evil = pack(_Evil(tmp_path / "ran"), b"guessed")
    for data in (evil, b"P" + pickle.dumps(_Evil(tmp_path / "ran")), b"P"):
        with pytest.raises(CollectiveMismatchError, match="no rank of this job has sent"):
            unpack(data, b"token")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "data",
    [b"", b"X", b"J", b"J" + bytes(8) + b"{}", b"J\x02" + bytes(7) + b"{}", b"J\x0b" + bytes(7) + b'{"what":[]}'],
)
def test_bytes_of_nobody_are_refused(data: bytes) -> None:
    """Any other bytes raise a plugframe error."""
    with pytest.raises(CollectiveMismatchError, match="no object of a rank"):
        unpack(data, b"token")


def test_a_tensor_cannot_read_past_its_bytes() -> None:
    """An offset or a size outside of the received bytes is refused."""
    data = pack(torch.ones(4), b"")
    for old, new in ((b",0,16]", b",8,16]"), (b"[4]", b"[9]"), (b"float32", b"float99"), (b"float32", b"os     ")):
        assert old in data
        with pytest.raises(CollectiveMismatchError, match="no object of a rank"):
            unpack(data.replace(old, new), b"")
