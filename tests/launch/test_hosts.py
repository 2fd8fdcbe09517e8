"""Jobs on several hosts: network namespaces, each running `plugframe run` like a cluster's node."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hosts import Hosts, hosts, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

TRAIN = """
import json, os, sys, time
import torch
from plugframe import Lite

lite = Lite()
lite.launch()
lite.seed_everything(1)
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
model, optimizer = lite.setup(model, optimizer)
data = torch.utils.data.TensorDataset(torch.randn(36, 32, generator=torch.Generator().manual_seed(2)))
losses = []
for (x,) in lite.setup_dataloaders(torch.utils.data.DataLoader(data, batch_size=4)):
    loss = (model(x).squeeze(1) - x.sum(1)).square().mean()
    lite.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(lite.all_reduce(loss.detach()).item())
    if len(losses) == 1 and len(sys.argv) > 1:
        open(f"here-{lite.global_rank}", "w").close()
        while not os.path.exists("go"):
            time.sleep(0.02)
if lite.is_global_zero:
    with open("losses.json", "w") as file:
        json.dump(losses, file)
lite.teardown()
"""

ELASTIC = """
import os, time
import torch
from plugframe import Lite

lite = Lite(strategy="ddp")
lite.launch()
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
model, optimizer = lite.setup(model, optimizer)
kept = lite.checkpoints("kept", keep_last=2)
state = {"model": model, "optimizer": optimizer}
kept.resume(state)
step = kept.step
if lite.is_global_zero:
    with open("worlds", "a") as file:
        file.write(f"{lite.world_size} {step}\\n")
while not lite.broadcast(os.path.exists("stop")):
    lite.backward(model(torch.ones(2, 4)).square().mean())
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    kept.save(step, state)
    time.sleep(0.05)  # a step takes a while
if lite.is_global_zero:
    with open("worlds", "a") as file:
        file.write(f"end {step}\\n")
lite.teardown()
"""


@pytest.fixture(scope="module")
def three() -> Iterator[Hosts]:
    with hosts(3) as made:
        yield made


def run(*options: str) -> list[str]:
    return [sys.executable, "-m", "plugframe", "run", "train.py", "--accelerator=cpu", *options]


def wait_for(condition: Callable[[], bool], folder: Path, *, timeout_s: float = 120.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "\n".join(f"{p.name}:\n{p.read_text()}" for p in sorted(folder.glob("*.log")))
        time.sleep(0.05)


def test_three_hosts_train_as_one(three: Hosts, tmp_path: Path) -> None:
    """Losses equal those of three ranks on one node, also over a slow link; only the given interface is used."""
    (tmp_path / "train.py").write_text(TRAIN)

    def losses() -> list[float]:
        found: list[float] = json.loads((tmp_path / "losses.json").read_text())
        (tmp_path / "losses.json").unlink()
        return found

    def start(*arguments: str) -> list[subprocess.Popen[str]]:
        nodes = ("--num-nodes=3", f"--main-address={three.address(0)}", "--main-port=29611")
        return [
            three.start(
                host,
                run(*nodes, f"--node-rank={host}", "--devices=1", "--", *arguments),
                cwd=tmp_path,
                log=tmp_path / f"{host}.log",
            )
            for host in range(3)
        ]

    done = subprocess.run(run("--devices=3"), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    expected = losses()

    processes = start("wait")
    wait_for(lambda: all((tmp_path / f"here-{rank}").exists() for rank in range(3)), tmp_path)
    for host in range(3):
        four = ["".join(f"{int(n):02X}" for n in reversed(three.address(host).split("."))), "0100007F"]
        for place in three.listening(host):
            assert place.split(":")[0][-8:] in four, f"host {host} listens at {place}"
    (tmp_path / "go").touch()
    assert [process.wait(120) for process in processes] == [0, 0, 0], (tmp_path / "0.log").read_text()
    assert losses() == pytest.approx(expected, rel=1e-6)

    if three.slow(1):
        assert [process.wait(120) for process in start()] == [0, 0, 0], (tmp_path / "0.log").read_text()
        assert losses() == pytest.approx(expected, rel=1e-6)


def test_a_wrong_address_is_told_in_time(three: Hosts, tmp_path: Path) -> None:
    """The error names the address after the timeout; until then, progress lines name the missing nodes."""
    (tmp_path / "train.py").write_text(TRAIN)
    nodes = ("--num-nodes=2", "--devices=1", "--rdzv-timeout=11", "--main-port=29612")
    processes = []
    for host, address in ((0, three.address(0)), (1, "10.77.0.99")):
        options = (*nodes, f"--node-rank={host}", f"--main-address={address}")
        processes.append(three.start(host, run(*options), cwd=tmp_path, log=tmp_path / f"{host}.log"))
    assert all(process.wait(60) != 0 for process in processes)
    said = [(tmp_path / f"{host}.log").read_text() for host in range(2)]
    assert "node 0: waiting for node rank 1 of 2 at 10.77.0.1:29612" in said[0]
    assert "node rank 1): start them with this --main-address" in said[0]
    assert "node 1: waiting for node 0 at 10.77.0.99:29612" in said[1]
    assert "Node 0 did not respond at 10.77.0.99:29612 within 11 s" in said[1]
    assert all("Traceback" not in text for text in said)


@pytest.mark.slow
def test_nodes_come_and_go(three: Hosts, tmp_path: Path) -> None:
    """Nodes are killed, cut off and restarted: the remaining nodes continue each time."""
    (tmp_path / "train.py").write_text(ELASTIC)
    processes: dict[int, subprocess.Popen[str]] = {}

    def start(host: int) -> None:
        where = f"--rdzv-endpoint={three.address(0)}:29613"
        command = run("--num-nodes=2:3", where, "--devices=1", "--max-restarts=9")
        processes[host] = three.start(host, command, cwd=tmp_path, log=tmp_path / f"{host}.log")

    def worlds() -> list[str]:
        path = tmp_path / "worlds"
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    def become(world: str, *, after: int) -> None:
        wait_for(lambda: world in worlds()[after:], tmp_path)

    for host in range(3):
        start(host)
    become("3", after=0)
    seen = len(worlds())
    processes[2].send_signal(signal.SIGKILL)
    become("2", after=seen)
    start(2)
    become("3", after=seen)
    seen = len(worlds())
    three.cut(1)
    become("2", after=seen)
    processes[1].send_signal(signal.SIGKILL)
    three.mend(1)
    start(1)
    become("3", after=seen)
    (tmp_path / "stop").touch()
    codes = {host: process.wait(120) for host, process in processes.items()}
    assert codes == {0: 0, 1: 0, 2: 0}, (tmp_path / "0.log").read_text()
    steps = [int(line.split()[1]) for line in (tmp_path / "worlds").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] > steps[0]
    told = (tmp_path / "0.log").read_text()
    assert "the job has 3 nodes now" in told
    assert "sent no heartbeat" in told
    assert "Traceback" not in told, told
