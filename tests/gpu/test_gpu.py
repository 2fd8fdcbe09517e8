"""What needs a GPU: run it with ``pytest -m gpu``; it is skipped where there is none."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from plugframe import Lite, UnsupportedError
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


def strategies() -> list[str]:
    """Return what is installed and works without options of its own; deepspeed in stages 2 and 3."""
    found = ["single", "ddp", "fsdp"]
    return [*found, "deepspeed", "deepspeed_stage_3"] if importlib.util.find_spec("deepspeed") else found


@pytest.mark.parametrize("strategy", strategies())
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_trains(precision: str, strategy: str) -> None:
    """Every precision trains on the GPU under every strategy that has it, and the loss falls."""
    if strategy.startswith("deepspeed") and precision in ("64-true", "16-true"):
        with pytest.raises(UnsupportedError, match="is not supported by strategy 'deepspeed"):
            Lite(accelerator="gpu", devices=1, strategy=strategy, precision=precision)
        return
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


def build(lite: Lite, *, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    with lite.init_module(empty_init=True):
        return nn.Sequential(nn.Linear(16, 512), nn.GELU(), nn.Linear(512, 4))


@pytest.mark.parametrize("source", strategies())
@pytest.mark.parametrize("target", strategies())
def test_checkpoints_go_from_strategy_to_strategy(source: str, target: str, tmp_path: Path) -> None:
    """What one strategy saved in parts, in the background, another one goes on from; CPU offload included."""
    path = tmp_path / "state"
    x, y = (tensor.cuda() for tensor in data()[:32])
    losses: dict[str, float] = {}
    for role, strategy in (("source", source), ("target", target)):
        with Lite(accelerator="gpu", devices=1, strategy=strategy, checkpoint="dcp") as lite:
            model = build(lite, seed=0 if role == "source" else 1)
            model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
            state = {"model": model, "optimizer": optimizer}
            if role == "source":
                lite.backward((model(x) - y).square().mean())
                optimizer.step()
                optimizer.zero_grad()
                lite.save(path, state, wait=False)
            else:
                lite.load(path, state)
            lite.backward((model(x) - y).square().mean())
            optimizer.step()
            losses[role] = (model(x) - y).square().mean().item()
    assert losses["target"] == pytest.approx(losses["source"], rel=1e-4)


def test_fsdp_offloads_to_the_host() -> None:
    """Parameters and optimizer state live in the host's memory, and the weights are those without offload."""
    from plugframe_builtins.fsdp.strategy import FSDP

    weights = []
    for offload in (False, True):
        with Lite(accelerator="gpu", devices=1, strategy=FSDP(cpu_offload=offload)) as lite:
            model = build(lite, seed=0)
            train(lite, model, epochs=1)
            parameter = next(model.parameters())
            assert parameter.device.type == ("cpu" if offload else "cuda")
            weights.append(parameter.full_tensor().cpu())
    torch.testing.assert_close(*weights)


def test_deferred_models_equal_eager_ones() -> None:
    """Values and the generator are those of an eager build on the GPU."""
    with Lite(accelerator="gpu", devices=1) as lite:
        torch.manual_seed(0)
        with lite.init_module():
            eager = nn.TransformerEncoderLayer(64, 4)
        after = torch.rand(3, device=lite.device)
        torch.manual_seed(0)
        with lite.init_module(empty_init=True):
            deferred = nn.TransformerEncoderLayer(64, 4)
        assert torch.equal(torch.rand(3, device=lite.device), after)
        lite.setup(deferred)
        for ours, theirs in zip(deferred.parameters(), eager.parameters(), strict=True):
            assert torch.equal(ours, theirs)
