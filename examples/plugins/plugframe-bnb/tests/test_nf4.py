"""nf4: what is frozen and what trains, on one rank and two, and what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")

from plugframe_bnb.precision import NF4, NF4Linear

from plugframe import Lite, SettingError, UnsupportedError
from plugframe.testing import run_ranks


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 3))


def set_up(lite: Lite, model: nn.Module) -> tuple[Any, torch.optim.Optimizer]:
    """Set up a model, then an optimizer of what trains."""
    model = lite.setup(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, lite.setup_optimizers(torch.optim.AdamW(trained, lr=0.01))


def train(lite: Lite, model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int = 20) -> list[float]:
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3]).square().mean()
        lite.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_adapters_train_and_weights_do_not() -> None:
    """At first the model computes nearly what it did; then adapters alone change, and the layer that is skipped."""
    x = torch.randn(8, 64)
    plain = network()
    with Lite(accelerator="cpu", devices=1, precision=NF4(skip=["3"])) as lite:
        model, optimizer = set_up(lite, network())
        error = (model(x) - plain(x)).norm() / plain(x).norm()
        assert 0 < error < 0.3
        before = {name: value.clone() for name, value in model.state_dict().items()}
        losses = train(lite, model, optimizer)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert losses[-1] < losses[0] / 2
    assert changed == {"0.down", "0.up", "2.down", "2.up", "3.weight", "3.bias"}
    assert model[0].packed.numel() == 64 * 64 // 2


def test_a_checkpoint_holds_everything(tmp_path: Path) -> None:
    """Another model computes the same after loading: packed weights, their scales and adapters."""
    x = torch.randn(8, 64)
    with Lite(accelerator="cpu", devices=1, precision=NF4()) as lite:
        model, optimizer = set_up(lite, network())
        train(lite, model, optimizer, 2)
        lite.save(tmp_path / "x", {"model": model, "optimizer": optimizer})
        other, again = set_up(lite, network(seed=1))
        assert not torch.equal(other(x), model(x))
        lite.load(tmp_path / "x", {"model": other, "optimizer": again})
        assert torch.equal(other(x), model(x))


def test_an_optimizer_of_frozen_weights_is_refused() -> None:
    """The error says in which order to set up; a model without linear layers is refused too."""
    with Lite(accelerator="cpu", devices=1, precision=NF4()) as lite:
        model = network()
        with pytest.raises(SettingError, match=r"call lite.setup_module\(model\) first, then make the optimizer"):
            lite.setup(model, torch.optim.AdamW(model.parameters()))
    with (
        Lite(accelerator="cpu", devices=1, precision=NF4(skip=["0"])) as lite,
        pytest.raises(UnsupportedError, match=r"finds no linear layer inside Sequential to convert; .* leaves out 1"),
    ):
        lite.setup(nn.Sequential(nn.Linear(64, 64)))


def gradients(world: Any) -> list[Tensor]:
    """Return the gradients of this rank after a step on its half of a batch."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    with Lite(accelerator="cpu", strategy="ddp", precision="bnb-nf4") as lite:
        model, _ = set_up(lite, network())
        lite.backward(model(x[lite.global_rank * 16 :][:16]).square().mean())
        assert type(model[0]) is NF4Linear
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_two_ranks_of_ddp_have_equal_gradients() -> None:
    """Gradients of adapters are averaged over ranks."""
    one, two = run_ranks(2, gradients)
    assert len(one) == 6
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
