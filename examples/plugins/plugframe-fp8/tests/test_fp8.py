"""fp8-mixed computes linear layers in fp8, and nothing else."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from plugframe_fp8.linear import FORMATS, quantize
from plugframe_fp8.precision import Fp8Mixed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plugframe import Lite
from plugframe.errors import SettingError


def job(precision: Any = "fp8-mixed") -> Lite:
    return Lite(accelerator="cpu", devices=1, precision=precision)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


def gradients(precision: str, net: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    with job(precision) as lite:
        net = lite.setup(net)
        output = net(x)
        lite.backward(output.square().mean())
        return output.detach(), [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


def angle(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_a_tensor_of_any_size_fits(name: str, size: float) -> None:
    """The largest magnitude maps to the maximum of the format; the others are within its rounding error."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * size
    q, scale = quantize(x, FORMATS[name])
    max_value, spacing = torch.finfo(FORMATS[name]).max, torch.finfo(FORMATS[name]).eps
    assert q.dtype is FORMATS[name]
    assert float(q.float().abs().max()) == max_value
    large = x.abs() > x.abs().max() / 16
    torch.testing.assert_close((q.float() * scale)[large], x[large], rtol=spacing / 2 * 1.001, atol=0)


def test_zeros_empty_and_nonfinite_tensors() -> None:
    """Zeros stay zeros; inf and NaN give non-finite results; empty tensors stay empty."""
    q, scale = quantize(torch.zeros(3), torch.float8_e4m3fn)
    assert (q.float() * scale).tolist() == [0, 0, 0]
    for wrong in (float("inf"), float("nan")):
        q, scale = quantize(torch.tensor([1.0, wrong]), torch.float8_e4m3fn)
        assert not bool(torch.isfinite(q.float() * scale).all())
    assert quantize(torch.zeros(0, 3), torch.float8_e5m2)[0].shape == (0, 3)


def test_it_is_coarser_than_bfloat16_and_has_the_same_direction() -> None:
    """Outputs and gradients differ from float32 by a few percent, and have the same direction."""
    net, x = network(), torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    exact, exact_grads = gradients("32-true", copy.deepcopy(net), x)
    fp8, fp8_grads = gradients("fp8-mixed", copy.deepcopy(net), x)
    bf16, _ = gradients("bf16-mixed", copy.deepcopy(net), x)
    assert 0 < (bf16 - exact).norm() < (fp8 - exact).norm() / 2
    assert (fp8 - exact).norm() / exact.norm() < 0.1
    assert all(angle(a, b) > 0.99 for a, b in zip(fp8_grads, exact_grads, strict=True))
    assert {gradient.dtype for gradient in fp8_grads} == {torch.float32}


def test_tensors_saved_for_backward_are_fp8() -> None:
    """A linear layer saves its input and its weight in fp8."""
    saved: list[torch.dtype] = []

    def record(tensor: Tensor) -> Tensor:
        saved.extend([tensor.dtype] * (tensor.numel() > 1))
        return tensor

    with job() as lite, torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        net = lite.setup(nn.Linear(16, 8, bias=False))
        loss = net(torch.randn(4, 16)).sum()
        lite.backward(loss)
    assert saved == [torch.float8_e4m3fn, torch.float8_e4m3fn]


def test_the_module_is_the_users_own() -> None:
    """Classes and state keys are unchanged; a copy, and the module after tear-down, compute as before."""
    net, x = network(), torch.randn(3, 16)
    before, keys, classes = net(x), list(net.state_dict()), [type(part) for part in net.modules()]
    with job() as lite:
        net = lite.setup(net)
        assert [type(part) for part in list(net.modules())[1:]] == classes[1:]
        assert list(net.state_dict()) == keys
        assert not torch.equal(net(x), before)
        for plain in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(plain(x), before)
    assert [type(part) for part in net.modules()] == classes
    assert torch.equal(net(x), before)


class HeadApart(nn.Module):
    """A model with one layer outside of fp8."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        with torch.autocast("cpu", enabled=False):
            return self.head(x.float())


def test_disabled_autocast_disables_fp8() -> None:
    """A layer under disabled autocast computes in float32."""
    torch.manual_seed(0)
    model = HeadApart()
    x = torch.randn(5, 16)
    with job() as lite:
        output = lite.setup(model)(x)
        with lite.autocast():
            hidden = model.body(x)
    torch.testing.assert_close(output, model.head(hidden.float()), rtol=0, atol=0)


class Checkpointed(nn.Module):
    """A network that recomputes its layers in backward, in the precision of the job."""

    def __init__(self, layers: nn.Module, lite: Lite) -> None:
        super().__init__()
        self.layers = layers
        self.contexts = lambda: (nullcontext(), lite.autocast())

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.layers, x, use_reentrant=False, context_fn=self.contexts)


def test_checkpointed_layers_have_the_same_gradients() -> None:
    """Gradients equal those without checkpointing."""
    net, x = network(), torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    _, expected = gradients("fp8-mixed", copy.deepcopy(net), x)
    with job() as lite:
        again = lite.setup(Checkpointed(net, lite))
        lite.backward(again(x).square().mean())
    torch.testing.assert_close([parameter.grad for parameter in net.parameters()], expected, rtol=0, atol=0)


def test_a_wrong_format_is_refused() -> None:
    """The error lists the formats."""
    with pytest.raises(SettingError, match="gradients='e3m4' is not a format: use one of 'e5m2', 'e4m3'"):
        Fp8Mixed(gradients="e3m4")
