"""What fp8-mixed promises: numbers of 8 bits where it says so, and nowhere else."""

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
    """Its greatest number is the format's greatest, and the others are as near as the format's bits allow."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * size
    q, scale = quantize(x, FORMATS[name])
    most, spacing = torch.finfo(FORMATS[name]).max, torch.finfo(FORMATS[name]).eps
    assert q.dtype is FORMATS[name]
    assert float(q.float().abs().max()) == most
    large = x.abs() > x.abs().max() / 16
    torch.testing.assert_close((q.float() * scale)[large], x[large], rtol=spacing / 2 * 1.001, atol=0)


def test_nothing_and_what_is_not_finite() -> None:
    """Zeros stay zeros; infinities and NaN are not hidden; an empty tensor is one."""
    q, scale = quantize(torch.zeros(3), torch.float8_e4m3fn)
    assert (q.float() * scale).tolist() == [0, 0, 0]
    for wrong in (float("inf"), float("nan")):
        q, scale = quantize(torch.tensor([1.0, wrong]), torch.float8_e4m3fn)
        assert not bool(torch.isfinite(q.float() * scale).all())
    assert quantize(torch.zeros(0, 3), torch.float8_e5m2)[0].shape == (0, 3)


def test_it_is_coarser_than_bfloat16_and_goes_the_same_way() -> None:
    """Output and gradients differ from float32's by some percent, and point where they point."""
    net, x = network(), torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    exact, exact_grads = gradients("32-true", copy.deepcopy(net), x)
    fp8, fp8_grads = gradients("fp8-mixed", copy.deepcopy(net), x)
    bf16, _ = gradients("bf16-mixed", copy.deepcopy(net), x)
    assert 0 < (bf16 - exact).norm() < (fp8 - exact).norm() / 2
    assert (fp8 - exact).norm() / exact.norm() < 0.1
    assert all(angle(a, b) > 0.99 for a, b in zip(fp8_grads, exact_grads, strict=True))
    assert {gradient.dtype for gradient in fp8_grads} == {torch.float32}


def test_what_is_kept_for_backward_takes_a_byte_a_number() -> None:
    """A linear layer keeps its input and its weight in fp8."""
    kept: list[torch.dtype] = []

    def note(tensor: Tensor) -> Tensor:
        kept.extend([tensor.dtype] * (tensor.numel() > 1))
        return tensor

    with job() as lite, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        net = lite.setup(nn.Linear(16, 8, bias=False))
        loss = net(torch.randn(4, 16)).sum()
        lite.backward(loss)
    assert kept == [torch.float8_e4m3fn, torch.float8_e4m3fn]


def test_the_module_is_the_users_own() -> None:
    """Its layers keep their class, its state its keys; a copy, and the module afterwards, compute as they did."""
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
    """A model that keeps one layer out of fp8."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        with torch.autocast("cpu", enabled=False):
            return self.head(x.float())


def test_autocast_switched_off_switches_fp8_off() -> None:
    """What a model computes in float32 on purpose stays in float32."""
    torch.manual_seed(0)
    model = HeadApart()
    x = torch.randn(5, 16)
    with job() as lite:
        output = lite.setup(model)(x)
        with lite.autocast():
            hidden = model.body(x)
    torch.testing.assert_close(output, model.head(hidden.float()), rtol=0, atol=0)


class Checkpointed(nn.Module):
    """A network whose layers are computed again in backward, in the precision of the job."""

    def __init__(self, layers: nn.Module, lite: Lite) -> None:
        super().__init__()
        self.layers = layers
        self.contexts = lambda: (nullcontext(), lite.autocast())

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.layers, x, use_reentrant=False, context_fn=self.contexts)


def test_a_checkpointed_layer_comes_out_as_before() -> None:
    """Gradients are those of the layers that were kept."""
    net, x = network(), torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    _, expected = gradients("fp8-mixed", copy.deepcopy(net), x)
    with job() as lite:
        again = lite.setup(Checkpointed(net, lite))
        lite.backward(again(x).square().mean())
    torch.testing.assert_close([parameter.grad for parameter in net.parameters()], expected, rtol=0, atol=0)


def test_a_wrong_format_is_refused() -> None:
    """In one line with those there are."""
    with pytest.raises(SettingError, match="gradients='e3m4' is no format: use one of 'e5m2', 'e4m3'"):
        Fp8Mixed(gradients="e3m4")
