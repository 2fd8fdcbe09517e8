"""Launch on two nodes, both on this host: the second launcher runs in its own process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

from plugframe.errors import EnvironmentMismatchError, RankFailedError, UsageError
from plugframe.hooks.launcher import Job
from plugframe.hooks.variables import TOKEN
from plugframe.launch import nodes, supervise
from plugframe.launch.rendezvous import listening, serve
from plugframe.launch.signed import SignedStore

#: Runs jobs, one for each line it reads, and prints how each one went.
OTHER_NODE = """
import json, sys
from plugframe.errors import RankFailedError
from plugframe.hooks.launcher import Job
from plugframe.launch import engine, supervise
print("ready", flush=True)
for line in sys.stdin:
    try:
        supervise(Job(**json.loads(line)))
        print(json.dumps(["", 0]), flush=True)
    except RankFailedError as error:
        print(json.dumps([error.report, error.exit_code]), flush=True)
"""


class TwoNodes:
    """Runs a script on two nodes with one rank each."""

    def __init__(self, other: subprocess.Popen[str]) -> None:
        self.other = other
        self.port = 0

    def resume(self) -> None:
        self.other.send_signal(signal.SIGCONT)

    def run(
        self, script: str, *, on_failure: Callable[[], None] = lambda: None, **settings: Any
    ) -> list[tuple[str, int]]:
        """Return the report and exit code of each node."""
        assert self.other.stdin is not None
        assert self.other.stdout is not None
        self.port = free_port()
        Path("train.py").write_text("import os, signal, sys\n" + textwrap.dedent(script))
        job = {
            "num_processes": 1,
            "num_nodes": 2,
            "main_address": "127.0.0.1",
            "main_port": self.port,
            "command": ("train.py",),
            "timeout_s": 60.0,
            **settings,
        }
        self.other.stdin.write(json.dumps({**job, "node_rank": 1}) + "\n")
        self.other.stdin.flush()
        try:
            supervise(Job(**job))
            here = ("", 0)
        except RankFailedError as error:
            here = (error.report, error.exit_code)
            on_failure()
        there = json.loads(self.other.stdout.readline())
        return [here, (there[0], there[1])]


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoNodes]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(TOKEN, "known to both launchers")
    with Path("stderr").open("w") as stderr:
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", OTHER_NODE]
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=stderr, text=True) as other:
            assert other.stdin is not None
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
            yield TwoNodes(other)
            other.stdin.close()
            assert other.wait(60) == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_two_nodes_run_restart_and_fail_as_one_job(two_nodes: TwoNodes, capfd: pytest.CaptureFixture[str]) -> None:
    """Ranks are numbered across nodes; a failure of one node restarts all nodes, or is reported on all."""
    place = """
    import json
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    json.dump([os.environ[name] for name in names], open(f"place{os.environ['RANK']}", "w"))
    """
    assert two_nodes.run(place) == [("", 0), ("", 0)]
    for rank in "01":
        found = json.loads(Path(f"place{rank}").read_text())
        assert found == [rank, "0", rank, "2", "1", "127.0.0.1", str(two_nodes.port)]

    again = """
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    open(f"port{attempt}{os.environ['RANK']}", "w").write(os.environ["MASTER_PORT"])
    if attempt == "0":
        while not (os.path.exists("port00") and os.path.exists("port01")):
            pass
        if os.environ["RANK"] == "1":
            sys.exit(5)
        signal.pause()
    """
    assert two_nodes.run(again, max_restarts=1) == [("", 0), ("", 0)]
    assert Path("port00").read_text() == Path("port01").read_text() == str(two_nodes.port)
    assert Path("port10").read_text() == Path("port11").read_text() != str(two_nodes.port)
    assert capfd.readouterr().err == "another node restarted; restart 1 of 1\n"
    assert Path("stderr").read_text() == "rank 1 failed (exited with code 5); restart 1 of 1\n"

    fail = """
    if os.environ["RANK"] == "1":
        raise ValueError("on node 1")
    signal.pause()
    """
    (here, here_code), (there, there_code) = two_nodes.run(fail)
    assert there.startswith(f"rank 1 on {socket.gethostname()} failed: ValueError: on node 1\nTraceback")
    assert here == f"{there}\nnode 0: stopped by the launcher"
    assert (here_code, there_code) == (1, 1)

    lost = """
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ConnectionResetError("Connection reset by peer")
    """
    reports = two_nodes.run(lost)
    assert [code for _, code in reports] == [137, 137]
    assert all(report.startswith(f"rank 0 on {socket.gethostname()} was killed by SIGKILL") for report, _ in reports)
    assert capfd.readouterr() == ("", "")
    assert Path("stderr").read_text().count("\n") == 1


def test_a_node_that_falls_silent_is_told_on_all_others(
    two_nodes: TwoNodes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Node 0 reports a launcher whose machine has stopped; that launcher gives up when it resumes."""
    monkeypatch.setattr(nodes, "LOST_NODE_TIMEOUT_S", 1.0)
    stop = """
    if os.environ["RANK"] == "1":
        os.kill(os.getppid(), signal.SIGSTOP)
    signal.pause()
    """
    here, there = two_nodes.run(stop, on_failure=two_nodes.resume)
    assert here == ("Node 1 sent no heartbeat for 1 s.", 1)
    assert there[0].startswith(("Node 0 at 127.0.0.1", "Node 1 sent no heartbeat"))
    assert there[1] == 1
    assert capfd.readouterr() == ("", "")
    assert Path("stderr").read_text() == ""


def refused(**settings: Any) -> str:
    job = {
        "num_processes": 1,
        "num_nodes": 2,
        "main_address": "127.0.0.1",
        "command": ("train.py",),
        "timeout_s": 0.2,
        "main_port": free_port(),
    }
    with pytest.raises(UsageError) as caught:
        supervise(Job(**{**job, **settings}))
    return str(caught.value)


def test_nodes_that_do_not_find_each_other_say_where_they_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has address, port, timeout and the missing nodes."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    port = free_port()
    assert refused(node_rank=1, main_port=port) == (
        f"Node 0 did not respond at 127.0.0.1:{port} within 0.2 s (Connection refused): start it, "
        "or correct --main-address and --main-port."
    )
    assert refused(main_port=port, num_nodes=3) == (
        f"2 of 3 nodes did not join at 127.0.0.1:{port} within 0.2 s (node rank 1, 2): start them with this "
        "--main-address and --main-port."
    )
    assert refused(main_address="nowhere.invalid").startswith("Node 0 cannot listen at nowhere.invalid:")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = refused(main_port=port)
        assert text.startswith(f"Node 0 cannot listen at 127.0.0.1:{port} (Address already in use by process ")
        assert f"process {os.getpid()} (" in text
        assert text.endswith("): choose another --main-port.")
    assert os.listdir() == ["train.py"]


def test_a_launcher_without_the_token_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store served without the job's token is rejected before ranks connect to addresses in it."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    store = serve(listening("127.0.0.1", 0), "127.0.0.1")
    monkeypatch.setenv(TOKEN, "another")
    SignedStore(store).set("plugframe/nodes", "2")
    monkeypatch.setenv(TOKEN, "the job's")
    job = Job(
        num_processes=1,
        num_nodes=2,
        node_rank=1,
        main_address="127.0.0.1",
        main_port=store.port,
        command=("train.py",),
        timeout_s=10.0,
    )
    with pytest.raises(EnvironmentMismatchError, match=f"without this {TOKEN}, or with another one"):
        supervise(job)


def test_words_are_signed_with_their_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value is only valid under its key and with the token; without a token every value is."""
    store = HashStore()
    monkeypatch.setenv(TOKEN, "token")
    words = SignedStore(store)
    words.set("port", "1")
    assert words.get("port") == b"1"
    assert words.compare_set("port", "1", "2") == b"2"
    assert words.compare_set("port", "1", "3") == b"2"
    assert words.compare_set("new", "", "4") == b"4"
    store.set("host", store.get("port"))
    for forged in ("host", "plain"):
        store.set("plain", "1")
        with pytest.raises(EnvironmentMismatchError, match="start all launchers of the job with the same"):
            words.get(forged)
    monkeypatch.delenv(TOKEN)
    assert SignedStore(store).get("plain") == b"1"


def test_torchs_rendezvous_opens_no_state_of_a_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that torch's elastic rendezvous would unpickle are verified first."""
    monkeypatch.setenv(TOKEN, "token")
    store = HashStore()
    backend = C10dRendezvousBackend(SignedStore(store), "job")  # type: ignore[arg-type]
    state, token, _ = backend.set_state(b"first") or (b"", None, False)
    assert backend.set_state(b"second", token) is not None
    found = backend.get_state()
    assert state == b"first"
    assert found is not None
    assert found[0] == b"second"
    (key,) = (key for key in store.list_keys() if "job" in key)
    store.set(key, b"Y29kZQ==")
    with pytest.raises(RendezvousConnectionError) as caught:
        backend.get_state()
    assert isinstance(caught.value.__cause__, EnvironmentMismatchError)
