"""The built-in precisions: dtypes of modules, inputs and outputs, and the loss scale in every order of steps."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from plugframe import OrderError, SettingError, UnsupportedError
from plugframe.adopt.optimizer import adopt_optimizer, release_optimizer
from plugframe.base import Precision
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins import bf16, fp16, fp32, fp64
from plugframe_builtins.precisions import FullPrecision, MixedPrecision, TruePrecision


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    name: str = "x"


class Pair(NamedTuple):
    value: torch.Tensor
    label: torch.Tensor


def set_up(precision: Precision, *, name: str = "16-mixed", dtypes: set[torch.dtype] | None = None) -> Any:
    """Set a precision up on a CPU that computes in `dtypes` (all of them if None)."""
    hooks = SimpleNamespace(
        accelerator_supports_dtype=lambda dtype, device: dtypes is None or dtype in dtypes,
        accelerator_autocast_type=lambda: "cpu",
    )
    context = Context(world=World(), device=torch.device("cpu"), hooks=hooks, names={"precision": name})
    precision.precision_setup(context)
    return precision


def scaled(scale: float = 1024.0, **options: Any) -> tuple[Any, GradScaler]:
    """Return 16-mixed with a loss scaler that can be looked at."""
    scaler = GradScaler("cpu", init_scale=scale, **options)
    return set_up(MixedPrecision("float16", scaler=scaler)), scaler


def model_and_optimizer(precision: Any, seed: int = 0) -> tuple[nn.Linear, torch.optim.SGD]:
    torch.manual_seed(seed)
    module = nn.Linear(4, 2)
    precision.precision_convert_module(module)
    return module, torch.optim.SGD(module.parameters(), lr=0.125)


def step(precision: Any, optimizer: torch.optim.Optimizer) -> Any:
    return precision.precision_optimizer_step(optimizer, optimizer.step, None)


def backward(precision: Any, loss: torch.Tensor) -> None:
    precision.precision_backward(loss, (), {})


def linear_loss(module: nn.Linear, factor: float = 1.0) -> torch.Tensor:
    """A loss whose gradients are exact in binary: powers of two, the same for every parameter."""
    return factor * (module.weight.sum() + module.bias.sum())


def bias_grad(module: nn.Linear) -> list[float]:
    assert module.bias.grad is not None
    values: list[float] = module.bias.grad.tolist()
    return values


# ------------------------------------------------------------------ names


def test_names_stand_for_precisions() -> None:
    """Short names are aliases, and ``auto`` takes single precision alone."""
    aliases = {"32": fp32.short, "64": fp64.short, "16": fp16.short, "bf16": bf16.short}
    assert {name: plugin.alias_of for name, plugin in aliases.items()} == {
        "32": "32-true",
        "64": "64-true",
        "16": "16-mixed",
        "bf16": "bf16-mixed",
    }
    others = (fp64.plugin, fp16.mixed, fp16.true, bf16.mixed, bf16.true)
    assert fp32.plugin.priority == 10
    assert all(plugin.priority is None and not plugin.devices for plugin in others)


def test_unknown_dtypes_are_refused() -> None:
    """A dtype a precision cannot be made of is refused, with those it can."""
    with pytest.raises(SettingError, match="dtype='int8' is not .* use one of 'float16', 'bfloat16', 'float64'"):
        TruePrecision("int8")
    with pytest.raises(SettingError, match=r"dtype=torch.float64 .* use one of 'float16', 'bfloat16'\."):
        MixedPrecision(torch.float64)
    assert TruePrecision(torch.float64).compute is torch.float64


def test_a_dtype_the_device_lacks_is_refused() -> None:
    """A precision the device does not compute in is an error, never another precision."""
    with pytest.raises(UnsupportedError, match=r"precision='64-true' needs torch.float64, which cpu"):
        set_up(TruePrecision("float64"), name="64-true", dtypes={torch.float32})
    with pytest.raises(UnsupportedError, match="needs torch.bfloat16"):
        set_up(MixedPrecision("bfloat16"), name="bf16-mixed", dtypes={torch.float32})


# ------------------------------------------------------------------ one dtype


def test_full_precision_changes_nothing() -> None:
    """In 32-true inputs, outputs and modules are the very same objects."""
    precision, data = set_up(FullPrecision(), name="32-true"), {"x": torch.ones(2, dtype=torch.float64)}
    module = nn.Linear(2, 2).double()
    assert precision.precision_convert_input(data) is data
    assert precision.precision_convert_output(data) is data
    assert precision.precision_convert_module(module).weight.dtype is torch.float64
    assert precision.precision_unscale(torch.optim.SGD(module.parameters())) is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_true_precision_converts_module_inputs_and_outputs(dtype: torch.dtype) -> None:
    """Module and float inputs get the dtype, outputs torch's default one; integers stay as they are."""
    precision = set_up(TruePrecision(dtype))
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    weight = module[0].weight
    assert precision.precision_convert_module(module) is module
    assert module[0].weight is weight
    assert weight.dtype is dtype
    assert module[1].num_batches_tracked.dtype is torch.int64
    data = {"x": torch.ones(3, 4), "i": torch.ones(3, dtype=torch.int64)}
    converted = precision.precision_convert_input((data, [data["x"]]))
    assert converted[0]["x"].dtype is converted[1][0].dtype is dtype
    assert converted[0]["i"] is data["i"]
    with precision.precision_forward_context():
        made = torch.zeros(1)
        out = module(converted[0]["x"]) + made
    assert made.dtype is out.dtype is dtype
    assert precision.precision_convert_output(out).dtype is torch.float32
    assert precision.precision_dtypes().parameter is precision.precision_dtypes().compute is dtype


def test_true_precision_keeps_complex_parameters() -> None:
    """A complex parameter keeps its imaginary part."""
    module = nn.Module()
    module.register_parameter("phase", nn.Parameter(torch.tensor([1 + 2j])))
    set_up(TruePrecision("bfloat16")).precision_convert_module(module)
    assert module.get_parameter("phase").tolist() == [1 + 2j]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        (TruePrecision("bfloat16"), torch.bfloat16),
        (TruePrecision("float64"), torch.float64),
        (MixedPrecision("bfloat16"), torch.float32),
        (FullPrecision(), torch.float32),
    ],
)
def test_init_context_makes_parameters_in_their_dtype(precision: Precision, dtype: torch.dtype) -> None:
    """A module built in the init context has the precision's parameter dtype, and the default one is put back."""
    set_up(precision)
    with precision.precision_init_context():
        assert nn.Linear(1, 1).weight.dtype is dtype
    assert torch.get_default_dtype() is torch.float32


# ------------------------------------------------------------------ mixed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_computes_in_16_bits_and_returns_32(dtype: torch.dtype) -> None:
    """Parameters and inputs stay float32, the arithmetic has 16 bits, and outputs come back in float32."""
    precision, module, x = set_up(MixedPrecision(dtype)), nn.Linear(4, 2), torch.ones(3, 4)
    precision.precision_convert_module(module)
    assert precision.precision_convert_input(x) is x
    with precision.precision_forward_context():
        out = module(x)
    assert module.weight.dtype is torch.float32
    assert out.dtype is dtype
    assert precision.precision_convert_output(out).dtype is torch.float32
    assert precision.precision_dtypes().parameter is torch.float32
    assert precision.precision_dtypes().compute is dtype


def test_fused_transformer_layers_are_off_under_autocast_of_the_cpu() -> None:
    """A layer that evaluates padded sequences in mixed precision runs, and the fused path is back after tear-down."""
    precision = set_up(MixedPrecision("bfloat16"))
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
    encoder = precision.precision_convert_module(nn.TransformerEncoder(layer, 1))
    padding = torch.tensor([[False, False, True]])
    with torch.no_grad(), precision.precision_forward_context():
        assert encoder(torch.randn(1, 3, 8), src_key_padding_mask=padding).shape == (1, 3, 8)
    precision.precision_teardown()
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_lstm_that_cannot_train_in_float16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named before the first step; other recurrent layers, and bfloat16, are taken."""
    monkeypatch.setattr("plugframe_builtins.precisions._trains_lstm", lambda _: False)
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "gru": nn.GRU(4, 4)})
    precision = set_up(MixedPrecision("float16"))
    with pytest.raises(UnsupportedError, match="does not support the LSTM 'rnn' of ModuleDict on cpu.*bf16-mixed"):
        precision.precision_convert_module(model)
    precision.precision_convert_module(model["gru"])
    set_up(MixedPrecision("bfloat16")).precision_convert_module(model)


def test_nested_outputs_are_converted() -> None:
    """Outputs are converted inside dicts, tuples, named tuples and dataclasses, and the containers keep their types."""
    precision = set_up(MixedPrecision("bfloat16"))
    half, index = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int64)
    result = precision.precision_convert_output(
        {"a": (half, None), "b": Output(half), "c": Pair(half, index), "d": [half.double()]}
    )
    assert result["a"][0].dtype is result["b"].logits.dtype is result["c"].value.dtype is torch.float32
    assert result["d"][0].dtype is torch.float32
    assert result["a"][1] is None
    assert isinstance(result["b"], Output)
    assert result["b"].name == "x"
    assert isinstance(result["c"], Pair)
    assert result["c"].label is index
    same = {"x": torch.ones(2)}
    assert precision.precision_convert_output(same) is same


def test_bfloat16_has_no_loss_scale() -> None:
    """bf16-mixed neither scales nor keeps state, and takes closures."""
    precision = set_up(MixedPrecision("bfloat16"), name="bf16-mixed")
    module, optimizer = model_and_optimizer(precision)
    backward(precision, linear_loss(module))
    assert bias_grad(module) == [1.0, 1.0]
    assert precision.precision_unscale(optimizer) is False
    assert precision.precision_state() == {}
    assert precision.precision_optimizer_step(optimizer, optimizer.step, lambda: 3.0) == 3.0


# ------------------------------------------------------------------ the loss scale


def test_gradients_are_scaled_and_the_step_is_that_of_float32() -> None:
    """After backward gradients are scaled; the step takes them unscaled and equals one in float32."""
    precision, _ = scaled()
    module, optimizer = model_and_optimizer(precision)
    before = module.bias.detach().clone()
    backward(precision, linear_loss(module))
    assert bias_grad(module) == [1024.0, 1024.0]
    step(precision, optimizer)
    assert torch.equal(module.bias, before - 0.125)


def test_half_precision_training_follows_float32() -> None:
    """A small regression under 16-mixed on the CPU ends near the one in float32."""
    ends = []
    for precision in (set_up(FullPrecision()), set_up(MixedPrecision("float16"))):
        module, optimizer = model_and_optimizer(precision)
        torch.manual_seed(1)
        x = torch.randn(32, 4)
        for _ in range(20):
            optimizer.zero_grad()
            with precision.precision_forward_context():
                out = module(x)
            loss = (precision.precision_convert_output(out) - 1.0).square().mean()
            backward(precision, loss)
            step(precision, optimizer)
        ends.append(module.weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=5e-3)


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    """A gradient that is not finite leaves the parameters alone, and the next loss is scaled by half as much."""
    precision, scaler = scaled()
    module, optimizer = model_and_optimizer(precision)
    before = copy.deepcopy(module.state_dict())
    backward(precision, linear_loss(module) * float("inf"))
    assert step(precision, optimizer) is None
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    optimizer.zero_grad()
    backward(precision, linear_loss(module))
    assert scaler.get_scale() == 512.0
    assert bias_grad(module) == [512.0, 512.0]


def test_unscaled_gradients_equal_those_of_float32() -> None:
    """Before clipping gradients are made true to size, once however often it is asked, and the step agrees."""
    precision, _ = scaled()
    module, optimizer = model_and_optimizer(precision)
    before = module.bias.detach().clone()
    backward(precision, linear_loss(module))
    assert precision.precision_unscale(optimizer) is True
    assert precision.precision_unscale(optimizer) is True
    assert bias_grad(module) == [1.0, 1.0]
    nn.utils.clip_grad_value_(module.parameters(), 0.5)
    step(precision, optimizer)
    assert torch.equal(module.bias, before - 0.0625)
    assert precision.precision_unscale(optimizer) is True
    assert bias_grad(module) == [0.5, 0.5]


@pytest.mark.parametrize("order", ["alternating", "both losses first"])
def test_two_optimizers_share_the_scale(order: str) -> None:
    """With two optimizers each gradient is unscaled by what it was scaled with, though the scale grows meanwhile."""
    precision, scaler = scaled(growth_interval=1)
    (one, one_optimizer), (two, two_optimizer) = (model_and_optimizer(precision, seed) for seed in (0, 1))
    starts = one.bias.detach().clone(), two.bias.detach().clone()
    for _ in range(3):
        one_optimizer.zero_grad()
        two_optimizer.zero_grad()
        backward(precision, linear_loss(one))
        if order == "alternating":
            step(precision, one_optimizer)
        backward(precision, linear_loss(two, 2.0))
        if order != "alternating":
            step(precision, one_optimizer)
        step(precision, two_optimizer)
    torch.testing.assert_close(one.bias, starts[0] - 3 * 0.125)
    torch.testing.assert_close(two.bias, starts[1] - 3 * 0.25)
    assert scaler.get_scale() > 1024.0


@pytest.mark.parametrize("change", ["growth", "overflow"])
def test_waiting_gradients_follow_the_scale(change: str) -> None:
    """Gradients accumulated for one optimizer stay right while the steps of another change the scale."""
    precision, scaler = scaled(growth_interval=1)
    (often, often_optimizer), (rare, rare_optimizer) = (model_and_optimizer(precision, seed) for seed in (0, 1))
    start = rare.bias.detach().clone()
    for _ in range(4):
        often_optimizer.zero_grad()
        backward(precision, linear_loss(often, 1.0 if change == "growth" else float("inf")))
        step(precision, often_optimizer)
        backward(precision, linear_loss(rare))
    assert scaler.get_scale() == (1024.0 * 2**4 if change == "growth" else 1024.0 / 2**4)
    step(precision, rare_optimizer)
    torch.testing.assert_close(rare.bias, start - 4 * 0.125)


def test_unscaling_between_accumulated_backwards() -> None:
    """Gradients that were looked at between two backwards add up as in float32."""
    precision, scaler = scaled()
    module, optimizer = model_and_optimizer(precision)
    for total in (1.0, 2.0, 3.0):
        backward(precision, linear_loss(module))
        precision.precision_unscale(optimizer)
        assert bias_grad(module) == [total, total]
    assert scaler.get_scale() == 1024.0


def test_saving_between_two_steps_changes_nothing() -> None:
    """Reading the state brings the scale up to date, and gradients that wait for a step stay right."""
    precision, _ = scaled(growth_interval=1)
    (one, one_optimizer), (two, two_optimizer) = (model_and_optimizer(precision, seed) for seed in (0, 1))
    start = two.bias.detach().clone()
    backward(precision, linear_loss(one) + linear_loss(two))
    step(precision, one_optimizer)
    assert precision.precision_state()["scale"] == 2048.0
    step(precision, two_optimizer)
    assert torch.equal(two.bias, start - 0.125)


def test_a_second_step_uses_the_same_gradients() -> None:
    """Two steps after one backward move the parameters twice as far, and both are skipped on an overflow."""
    precision, _ = scaled()
    module, optimizer = model_and_optimizer(precision)
    start = module.bias.detach().clone()
    backward(precision, linear_loss(module))
    step(precision, optimizer)
    step(precision, optimizer)
    torch.testing.assert_close(module.bias, start - 0.25)
    optimizer.zero_grad()
    backward(precision, linear_loss(module) * float("nan"))
    before = module.bias.detach().clone()
    step(precision, optimizer)
    step(precision, optimizer)
    assert torch.equal(module.bias, before)


def test_an_adopted_optimizer_runs_the_users_step() -> None:
    """The scaler's own call of ``step`` ends in the user's step, with the arguments it was given."""

    class Loud(torch.optim.SGD):
        heard: tuple[Any, ...] = ()

        def step(self, closure: Callable[[], float] | None = None, volume: int = 0) -> Any:
            self.heard = (*self.heard, volume)
            super().step()
            return "done"

    precision, _ = scaled()
    module, _ = model_and_optimizer(precision)
    optimizer = Loud(module.parameters(), lr=0.125)
    hooks = SimpleNamespace(strategy_optimizer_step=precision.precision_optimizer_step, on_optimizer_step=None)
    adopt_optimizer(optimizer, hooks=hooks)
    start = module.bias.detach().clone()
    backward(precision, linear_loss(module))
    assert optimizer.step(volume=7) == "done"
    assert optimizer.heard == (7,)
    torch.testing.assert_close(module.bias, start - 0.125)
    optimizer.zero_grad()
    backward(precision, linear_loss(module) * float("inf"))
    assert optimizer.step() is None
    assert optimizer.heard == (7,)
    release_optimizer(optimizer)


def test_a_fused_optimizer() -> None:
    """An optimizer that unscales by itself takes the same step, and skips the same overflow."""
    precision, scaler = scaled()
    module, _ = model_and_optimizer(precision)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.125, fused=True)
    start = module.bias.detach().clone()
    backward(precision, linear_loss(module))
    step(precision, optimizer)
    torch.testing.assert_close(module.bias, start - 0.125)
    backward(precision, linear_loss(module) * float("inf"))
    step(precision, optimizer)
    torch.testing.assert_close(module.bias, start - 0.125)
    precision.precision_state()
    assert scaler.get_scale() == 512.0


def test_closures_are_refused() -> None:
    """A closure cannot be re-evaluated under a loss scaler; the message says what to use instead."""
    precision, _ = scaled()
    _, optimizer = model_and_optimizer(precision)
    with pytest.raises(UnsupportedError, match="closure SGD.step.* use precision='bf16-mixed' or '32-true'"):
        precision.precision_optimizer_step(optimizer, optimizer.step, lambda: 0.0)


def test_an_optimizer_without_gradients_just_steps() -> None:
    """A step or an unscaling without any gradient does what it does in float32: nothing."""
    precision, _ = scaled()
    _, optimizer = model_and_optimizer(precision)
    assert precision.precision_unscale(optimizer) is True
    assert step(precision, optimizer) is None


def test_gradients_that_were_not_scaled_are_refused() -> None:
    """``loss.backward()`` in place of ``lite.backward(loss)`` is an error that says so."""
    precision, _ = scaled()
    module, optimizer = model_and_optimizer(precision)
    torch.autograd.backward(linear_loss(module))
    with pytest.raises(OrderError, match=r"compute them with lite.backward\(loss\)"):
        step(precision, optimizer)
    with pytest.raises(OrderError, match="none of them was scaled"):
        precision.precision_unscale(optimizer)


def test_half_precision_parameters_are_refused_unless_frozen() -> None:
    """A module to be trained in float16 does not fit 16-mixed; frozen float16 parts do."""
    precision, _ = scaled()
    with pytest.raises(UnsupportedError, match=r"this Linear has float16 ones: leave out its .half\(\)"):
        precision.precision_convert_module(nn.Linear(1, 1).half())
    precision.precision_convert_module(nn.Linear(1, 1).half().requires_grad_(False))


def test_the_state_is_put_back() -> None:
    """A resumed run goes on with the scale and the growth count of the saved one, in the middle of a loop too."""
    precision, _ = scaled(growth_interval=2)
    module, optimizer = model_and_optimizer(precision)
    backward(precision, linear_loss(module) * float("inf"))
    step(precision, optimizer)
    optimizer.zero_grad()
    backward(precision, linear_loss(module))
    step(precision, optimizer)
    state = precision.precision_state()
    assert state["scale"] == 512.0
    assert all(isinstance(value, (int, float)) for value in state.values())
    resumed, scaler = scaled(growth_interval=2)
    resumed.precision_load_state(state)
    for each in (precision, resumed):
        optimizer.zero_grad()
        backward(each, linear_loss(module))
        step(each, optimizer)
    assert resumed.precision_state() == precision.precision_state()
    assert scaler.get_scale() == 1024.0
    resumed.precision_load_state({})
    assert scaler.get_scale() == 1024.0


def test_teardown_forgets_the_scale() -> None:
    """A precision object that is set up again begins with a new scale."""
    precision = set_up(MixedPrecision("float16"))
    module, optimizer = model_and_optimizer(precision)
    backward(precision, linear_loss(module) * float("inf"))
    step(precision, optimizer)
    assert precision.precision_state()["scale"] == 2.0**15
    precision.precision_teardown()
    assert set_up(precision).precision_state()["scale"] == 2.0**16
