"""What needs a GPU: run it with ``pytest -m gpu``; it is skipped where there is none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from plugframe import Lite
from plugframe.base import Extension

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))


def data() -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(256, 16), torch.randn(256, 4))


def train(lite: Lite, model: nn.Module, *, epochs: int = 3) -> list[float]:
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.05))
    loader = lite.setup_dataloaders(DataLoader(data(), batch_size=32, shuffle=True, pin_memory=True))
    losses = []
    for _ in range(epochs):
        for x, y in loader:
            assert x.device == lite.device
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            lite.backward(loss)
            lite.clip_gradients(model, optimizer, max_norm=10.0)
            optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("strategy", ["single", "ddp"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_trains(precision: str, strategy: str) -> None:
    """Every precision trains on the GPU under every strategy, and the loss falls."""
    with Lite(accelerator="gpu", devices=1, strategy=strategy, precision=precision) as lite:
        assert lite.device.type == "cuda"
        losses = train(lite, make())
        assert losses[-1] < losses[0]


def test_fp32_equals_a_hand_written_loop() -> None:
    """The weights after training equal those of a loop in plain torch over the same batches."""
    model, plain = make(), make().cuda()
    with Lite(accelerator="cuda", devices=1) as lite:
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        other = torch.optim.SGD(plain.parameters(), lr=0.1)
        for x, y in DataLoader(data(), batch_size=32):
            for net, opt, back in ((model, optimizer, lite.backward), (plain, other, torch.Tensor.backward)):
                opt.zero_grad()
                back((net(x.cuda()) - y.cuda()).square().mean())
                opt.step()
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_compile_before_and_after_setup() -> None:
    """A compiled model computes what the eager one does, compiled before or after set-up, under ddp too."""
    x = torch.randn(8, 16, device="cuda")
    eager = make().cuda()
    for strategy in ("single", "ddp"):
        with Lite(accelerator="cuda", devices=1, strategy=strategy) as lite:
            before = copy.deepcopy(eager)
            before.compile()
            lite.setup(before)
            after = torch.compile(lite.setup(copy.deepcopy(eager)))
            for model in (before, after):
                lite.backward(model(x).sum())
                assert torch.allclose(model(x), eager(x), atol=1e-4)


def test_pinned_batches_do_not_block() -> None:
    """A batch from pinned memory is copied while the host goes on; the values arrive."""
    with Lite(accelerator="cuda", devices=1) as lite:
        batch = {"x": torch.arange(1024.0).pin_memory(), "n": 3}
        moved = lite.to_device(batch)
        torch.cuda.synchronize()
        assert moved["x"].device == lite.device
        assert torch.equal(moved["x"].cpu(), batch["x"])
        assert moved["n"] == 3


def test_memory_statistics_count_bytes() -> None:
    """Memory statistics are bytes, and the peak is at least what is allocated."""
    with Lite(accelerator="cuda", devices=1) as lite:
        kept = torch.zeros(2**20, device=lite.device)
        stats = lite.accelerator.accelerator_memory_stats(device=lite.device)
        assert stats["peak_allocated_bytes"] >= stats["allocated_bytes"] >= kept.numel() * 4


def test_states_come_back_with_the_devices_generator(tmp_path: Path) -> None:
    """A checkpoint restores weights, optimizer, loss scale and the generator of the GPU."""
    with Lite(accelerator="cuda", devices=1, precision="16-mixed") as lite:
        model = make()
        optimizer = torch.optim.AdamW(model.parameters())
        model, optimizer = lite.setup(model, optimizer)
        lite.backward(model(torch.randn(4, 16, device="cuda")).sum())
        optimizer.step()
        lite.save(tmp_path / "x.safetensors", {"model": model, "optimizer": optimizer})
        drawn = torch.rand(4, device="cuda")
        kept = [p.clone() for p in model.parameters()]
        for parameter in model.parameters():
            parameter.data.zero_()
        lite.load(tmp_path / "x.safetensors", {"model": model, "optimizer": optimizer})
        assert torch.equal(torch.rand(4, device="cuda"), drawn)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept, strict=True))


def test_init_module_builds_on_the_device() -> None:
    """Inside ``init_module`` parameters are made on the GPU, in the precision's dtype."""
    with Lite(accelerator="cuda", devices=1, precision="bf16-true") as lite:
        with lite.init_module():
            model = nn.Linear(4, 4)
        assert model.weight.device == lite.device
        assert model.weight.dtype is torch.bfloat16


def test_planning_initialises_no_device(run_python: Callable[[str], str]) -> None:
    """``Lite(...)`` makes its plan without a CUDA context: a process that launches others must have none."""
    code = "import torch, plugframe; plugframe.Lite(devices=1); print(torch.cuda.is_initialized())"
    assert run_python(code).strip() == "False"


def test_the_profiler_wraps_the_gpu_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extensions wrap the hooks on the GPU as on the CPU."""
    monkeypatch.chdir(tmp_path)

    class Nothing(Extension):
        """An extension that does nothing."""

    with Lite(accelerator="cuda", devices=1, plugins=["profiler", Nothing()]) as lite:
        train(lite, make(), epochs=1)
