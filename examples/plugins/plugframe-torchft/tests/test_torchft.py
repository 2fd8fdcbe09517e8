"""A replica that is killed in the middle of training costs the other a step, and comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchft", reason="torchft is not installed: pip install torchft")

from plugframe_torchft.strategy import TorchFT
from torchft.coordination import LighthouseServer

from plugframe import Lite, SettingError


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 150
    while not what():
        assert process.poll() is None, f"the replica ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_replica_comes_back(tmp_path: Path) -> None:
    """The other loses at most two steps and goes on alone; the new one gets its state; both end with equal weights."""
    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=200, heartbeat_timeout_ms=2000)
    address = f"http://127.0.0.1:{lighthouse.address().rpartition(':')[2]}"

    def start(number: int) -> subprocess.Popen[bytes]:
        script = str(Path(__file__).with_name("replica.py"))
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, script, str(tmp_path), address, str(number)], env=environ)

    def seen(number: int) -> list[int]:
        file = tmp_path / f"{number}.step"
        return [int(word) for word in file.read_text().split()] if file.exists() else [0, 0, 0]

    first, second = start(0), start(1)
    try:
        wait_for(lambda: seen(0)[1] == 2 and seen(1)[0] >= 5, first)
        lost = seen(0)[2] - seen(0)[0]
        second.kill()
        second.wait()
        wait_for(lambda: seen(0)[1] == 1, first)
        step, _, attempts = seen(0)
        assert attempts - step - lost <= 2
        (tmp_path / "1.step").unlink()
        second = start(1)
        wait_for(lambda: seen(0)[1] == 2 and seen(1)[0] > step, first)
        (tmp_path / "end").write_text(str(seen(0)[0] + 20))
        assert [first.wait(60), second.wait(60)] == [0, 0]
    finally:
        first.kill()
        second.kill()
        lighthouse.shutdown()
    one, two = (torch.load(tmp_path / f"{number}.weights") for number in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_wrong_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that does not exist, and a job without a lighthouse."""
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    with pytest.raises(SettingError, match="replica=2 does not exist: num_replicas=2 counts from 0"):
        TorchFT(replica=2, num_replicas=2)
    lite = Lite(accelerator="cpu", devices=1, strategy=TorchFT())
    with pytest.raises(SettingError, match="needs lighthouse=, or TORCHFT_LIGHTHOUSE"):
        lite.launch()
