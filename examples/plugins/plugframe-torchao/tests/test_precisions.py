"""The precisions: what is converted, how a run trains, saves and resumes, and its integer form at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")

from plugframe_torchao.precision import Float8, Int8Mixed, QuantizationAware

from plugframe import CheckpointMismatchError, Lite, UnsupportedError
from plugframe.testing import run_ranks


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 3))


def train(lite: Lite, model: nn.Module, num_steps: int = 20) -> tuple[nn.Module, torch.optim.Optimizer, list[float]]:
    """Train on a regression; return the losses."""
    model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    x = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3]).square().mean()
        lite.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses


@pytest.mark.parametrize("precision", [Float8(), Int8Mixed(), QuantizationAware(), QuantizationAware(bits=4)])
def test_it_trains_like_float32_but_not_the_same(precision: Any) -> None:
    """Losses fall, are near those of float32, and are not equal to them; layers that do not fit stay."""
    with Lite(accelerator="cpu", devices=1, precision="32-true") as lite:
        _, _, exact = train(lite, network())
    with Lite(accelerator="cpu", devices=1, precision=precision) as lite:
        model, _, losses = train(lite, network())
        parts = [type(part).__name__ for part in model.modules()]
    assert losses != exact
    assert losses[-1] < losses[0] / 2
    assert abs(losses[-1] - exact[-1]) < 0.15 * exact[0]
    assert {"Float8Linear", "FakeQuantizedLinear", "Int8MixedPrecisionTrainingLinear"} & set(parts)
    assert type(model[3]) is nn.Linear  # type: ignore[index]


def test_finalize_returns_integers_that_are_saved(tmp_path: Path) -> None:
    """The integer form predicts as the model that trained, and loads into such a form only."""
    x = torch.randn(8, 32)
    with Lite(accelerator="cpu", devices=1, precision=QuantizationAware()) as lite:
        model, _, _ = train(lite, network())
        with torch.no_grad():
            before = model(x)
        final = lite.finalize(model)
        weight: Any = final.get_parameter("0.weight")
        assert weight.qdata.dtype is torch.int8
        with torch.no_grad():
            torch.testing.assert_close(final(x), before, rtol=0.05, atol=0.05)
            expected = final(x)
        lite.save(tmp_path / "x", {"model": final})
        other = lite.finalize(train(lite, network(), 1)[0])
        lite.load(tmp_path / "x", {"model": other})
        with torch.no_grad():
            assert torch.equal(other(x), expected)
        with pytest.raises(CheckpointMismatchError, match=r"model.0.weight is a Parameter, the checkpoint has torchao"):
            lite.load(tmp_path / "x", {"model": network()})


def test_skip_leaves_layers_alone() -> None:
    """A word in a layer's name excludes it; to exclude all is an error."""
    with Lite(accelerator="cpu", devices=1, precision=Float8(skip=["2"])) as lite:
        model = lite.setup(network())
        assert [type(part).__name__ for part in model.children()] == ["Float8Linear", "ReLU", "Linear", "Linear"]
    with (
        Lite(accelerator="cpu", devices=1, precision=Float8(skip=["0", "2"])) as lite,
        pytest.raises(UnsupportedError, match=r"finds no linear layer in Sequential to convert: sizes must be"),
    ):
        lite.setup(network())


def gradients(world: Any) -> list[list[Tensor]]:
    """Return the gradients of this rank after a step on its half of a batch, for two precisions."""
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for precision in ("torchao-fp8", "torchao-int8"):
        with Lite(accelerator="cpu", strategy="ddp", precision=precision) as lite:
            model = lite.setup(network())
            lite.backward(model(x[lite.global_rank * 16 :][:16]).square().mean())
            found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    return found


def test_two_ranks_of_ddp_have_equal_gradients() -> None:
    """Gradients are averaged over ranks as those of other layers."""
    one, two = run_ranks(2, gradients)
    for ours, theirs in zip(one, two, strict=True):
        assert len(ours) == 6
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
