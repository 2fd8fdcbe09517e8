"""The device on its own, and training on it from the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plugframe_pydevice import backend
from plugframe_pydevice.accelerator import PyDevice

TRAIN = Path(__file__).parent.parent / "train.py"


def test_results_are_the_cpus() -> None:
    """Outputs and gradients equal the CPU's; views and in-place operators share memory."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    found: list[torch.Tensor] = []
    for device in ("cpu", "pydevice:1"):
        leaf = weight.to(device).detach().requires_grad_()
        loss = ((x.to(device) @ leaf.T).relu().softmax(-1) ** 2).sum()
        rows = torch.autograd.grad(loss, leaf)[0]
        rows[1:3].mul_(2)
        rows.t()[0].fill_(1)
        found.append(rows.cpu())
    assert torch.allclose(found[0], found[1])


def test_memory_is_counted() -> None:
    """Statistics count the bytes of tensors per device; the peak stays until it is reset."""
    plugin, device = PyDevice(), torch.device("pydevice", 3)
    before = plugin.accelerator_memory_stats(device)["allocated_bytes"]
    tensor = torch.zeros(1000, device=device)
    assert plugin.accelerator_memory_stats(device)["allocated_bytes"] == before + 4000
    del tensor
    stats = plugin.accelerator_memory_stats(device)
    assert stats["allocated_bytes"] == before
    assert stats["peak_allocated_bytes"] >= before + 4000


def test_wrong_devices_are_errors() -> None:
    """Mixing devices raises, and so does a device that does not exist."""
    here = torch.ones(2, device="pydevice:0")
    with pytest.raises(RuntimeError, match="same device"):
        here + torch.ones(2)
    with pytest.raises(RuntimeError, match="same device"):
        here + torch.ones(2, device="pydevice:1")
    with pytest.raises(RuntimeError, match=f"There is no pydevice:{backend.device_count()}"):
        torch.ones(2, device=f"pydevice:{backend.device_count()}")


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        (("--devices=1",), 0.2186),
        (("--accelerator=pydevice", "--devices=2", "--strategy=ddp", "--precision=bf16-mixed"), 0.9216),
    ],
    ids=["auto", "ddp"],
)
def test_training_reaches_the_loss_of_the_cpu(options: tuple[str, ...], loss: float, tmp_path: Path) -> None:
    """From the command line: automatically on one device, and by name on two in mixed precision."""
    command = [sys.executable, "-m", "plugframe", "run", str(TRAIN), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"plugframe: \w+ on (2 × )?pydevice, ", done.stderr)
    assert float(done.stdout.split()[-1]) == pytest.approx(loss, abs=0.01)
