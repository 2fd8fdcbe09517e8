"""Deferred initialisation: built without values, and then exactly what an eager build gives."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from plugframe import Lite
from plugframe.deferred.module import deferring, is_deferred, materialize, materialize_module, records
from plugframe.errors import UnsupportedError

CPU = torch.device("cpu")
Build = Callable[[], nn.Module]


def eager(build: Build) -> tuple[nn.Module, Tensor]:
    """Build with a fixed seed; return the module and the generator's state afterwards."""
    torch.manual_seed(3)
    with CPU:
        module = build()
    return module, torch.get_rng_state()


def deferred(build: Build) -> tuple[nn.Module, Tensor]:
    """Build the same without values."""
    torch.manual_seed(3)
    with deferring(CPU, min_numel=64):
        module = build()
    return module, torch.get_rng_state()


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, under all of their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def same(left: nn.Module, right: nn.Module) -> bool:
    """Whether two modules agree bit for bit, in layout and in what is trained."""
    ours, theirs = tensors(left), tensors(right)
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name])
        and (ours[name].dtype, ours[name].stride(), ours[name].requires_grad, type(ours[name]))
        == (theirs[name].dtype, theirs[name].stride(), theirs[name].requires_grad, type(theirs[name]))
        for name in ours
    )


class Weight(nn.Module):
    """One parameter, initialised by what it is given."""

    def __init__(self, start: Callable[[nn.Parameter], Any], *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*(shape or (40, 30))))
        start(self.weight)


INITS: dict[str, Callable[[nn.Parameter], Any]] = {
    "uniform": lambda w: init.uniform_(w, -1, 3),
    "normal": lambda w: init.normal_(w, 1, 2),
    "own generator": lambda w: init.normal_(w, generator=torch.Generator().manual_seed(5)),
    "truncated": lambda w: init.trunc_normal_(w, std=0.02),
    "truncated near": lambda w: init.trunc_normal_(w, a=-1, b=1),
    "truncated far": lambda w: init.trunc_normal_(w, std=2, a=1, b=2),
    "kaiming uniform": lambda w: init.kaiming_uniform_(w, a=5**0.5),
    "kaiming normal": lambda w: init.kaiming_normal_(w, mode="fan_out"),
    "xavier uniform": lambda w: init.xavier_uniform_(w),
    "xavier normal": lambda w: init.xavier_normal_(w),
    "orthogonal": lambda w: init.orthogonal_(w, gain=2),
    "sparse": lambda w: init.sparse_(w, 0.3),
    "eye": lambda w: init.eye_(w),
    "constant": lambda w: init.constant_(w, 3.0),
    "twice": lambda w: (init.normal_(w), init.uniform_(w)),
    "data": lambda w: w.data.normal_().mul_(0.02),
    "rows": lambda w: (init.normal_(w), w.data[0].fill_(0), w.data.T[1].uniform_(), w.data[2:4].copy_(w.data[5:7])),
    "copied": lambda w: w.data.copy_(torch.randn(w.shape, device=w.device).to(w.device)),
    "if looked at": lambda w: init.ones_(w) if not w.is_meta and w.device.type == "cpu" else None,
}


@pytest.mark.parametrize("name", INITS)
def test_initialisers_give_what_they_give_eagerly(name: str) -> None:
    """Every initialiser gives its values later, bit for bit, and moves the generator on at once."""

    def build() -> nn.Module:
        return Weight(INITS[name])

    reference, state = eager(build)
    module, after = deferred(build)
    assert is_deferred(module.weight)
    assert torch.equal(after, state)
    materialize_module(module, CPU)
    assert same(module, reference)
    assert torch.equal(torch.get_rng_state(), state)


class Tied(nn.Module):
    """An embedding whose weight is the output's, initialised anew when all is built."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 20, padding_idx=3)
        self.norm = nn.LayerNorm(20)
        self.output = nn.Linear(20, 50, bias=False)
        self.output.weight = self.embedding.weight
        self.alias = nn.Parameter(self.embedding.weight.data)
        self.register_buffer("window", self.embedding.weight.data[3:7].T)
        self.apply(self.start)

    def start(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, std=0.02)


class Computed(nn.Module):
    """Parameters and buffers that are computed, from each other too, and values that the constructor reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = nn.Parameter(torch.randn(30, 30) * 0.02)
        self.frozen = nn.Parameter(self.scaled.data[:10].clone(), requires_grad=False)
        self.register_buffer("mask", torch.tril(torch.ones(20, 20)).view(1, 20, 20))
        self.register_buffer("frequencies", torch.outer(torch.arange(30.0), 1 / 10000 ** (torch.arange(0, 20, 2) / 20)))
        self.register_buffer("positions", torch.arange(100, device=self.scaled.device).expand(1, -1))
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 100)]
        self.plain = torch.arange(100)
        grid = torch.rand(20, 20)
        grid[grid > 0.5] = 0.5
        grid[3, 4], grid[5], grid[1:3, 2] = 7, torch.tensor(2.0), torch.tensor(3.0)
        self.where = nn.Parameter(torch.where(grid > 0.3, 1.0, grid))
        self.joined = nn.Parameter(torch.cat([grid, self.mask[0]]).clamp(min=torch.tensor(0.1)))
        found = torch.unique(torch.randint(0, 90, (1000,)))
        self.register_buffer("dynamic", found.float() @ torch.ones(len(found), 70))
        self.coins = nn.Parameter(torch.bernoulli(torch.full((20, 20), 0.3)))
        self.dropped = nn.Parameter(F.dropout(self.scaled.data, 0.5))
        self.around = nn.Parameter(torch.normal(self.scaled.data, 1.0))
        self.integer_ratio = nn.Parameter(torch.arange(100) / 7)
        turned = torch.randn(100, dtype=torch.complex64)
        self.turned = nn.Parameter(turned.conj() * 2 + turned)
        self.half = nn.Linear(20, 20).half()
        self.moved = nn.Linear(20, 20).to("cpu").to(device=CPU, dtype=torch.bfloat16)
        self.copied = copy.deepcopy(self.moved)
        self.loaded = nn.Linear(20, 20)
        source = {"weight": torch.ones(20, 20) * 3, "bias": torch.zeros(20)}
        self.loaded.load_state_dict(source)
        source["weight"].zero_()
        small = torch.full((60,), 2.0)
        self.repeated = nn.Parameter(torch.zeros(2, 60))
        self.repeated.data.copy_(small)
        small.zero_()
        self.read = (float(self.scaled.detach().sum()), self.scaled.tolist(), float(self.scaled.detach().numpy().sum()))
        self.read += (bool((self.scaled > 0).any()), torch.equal(self.coins, self.coins.clone()))


MODULES: dict[str, Build] = {
    "tied": Tied,
    "computed": Computed,
    "dirac": lambda: Weight(init.dirac_, 16, 16, 3),
    "recurrent": lambda: nn.ModuleList([nn.LSTM(20, 30, 2, bidirectional=True), nn.GRU(20, 30, 2)]),
    "attention": lambda: nn.MultiheadAttention(32, 4),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
    "convolution": lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(100)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(40, 50)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(40, 50)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(40, 50)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_give_what_they_give_eagerly(name: str) -> None:
    """Whole modules get their values in place: the objects stay, and so does what an optimizer holds."""
    reference, state = eager(MODULES[name])
    module, after = deferred(MODULES[name])
    assert torch.equal(after, state)
    before = tensors(module)
    assert any(map(is_deferred, before.values()))
    assert all(is_deferred(tensor) or tensor.numel() < 64 for tensor in before.values())
    values = {key: value() for key, value in records(module).items()}
    materialize_module(module, CPU)
    assert same(module, reference)
    now = tensors(module)
    assert all(now[key] is before[key] for key in before)
    assert all(torch.equal(now[key], value) for key, value in values.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_shared_stays_shared() -> None:
    """Tied parameters, aliases and views lie in one storage afterwards; attributes get their values too."""
    module, _ = deferred(Tied)
    assert isinstance(module, Tied)
    materialize_module(module, CPU)
    weight = module.embedding.weight
    assert module.output.weight is weight
    assert module.alias.data_ptr() == weight.data_ptr()
    assert module.window.data_ptr() == weight.data_ptr() + 3 * 20 * 4
    reference, _ = eager(Computed)
    other, _ = deferred(Computed)
    assert isinstance(other, Computed)
    assert isinstance(reference, Computed)
    assert is_deferred(other.plain)
    materialize_module(other, CPU)
    assert torch.equal(other.plain, torch.arange(100))
    assert (other.read, other.rates) == (reference.read, reference.rates)


class Live(TorchDispatchMode):
    """Counts the bytes of the real storages that live, at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                storage = leaf.untyped_storage()
                if id(storage) not in self.sizes:
                    weakref.finalize(storage, self.sizes.pop, id(storage), None)
                self.sizes[id(storage)] = storage.nbytes()
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def test_memory_is_that_of_one_parameter() -> None:
    """Neither building nor materialising one tensor after the other needs more than one parameter's storage."""

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(200, 200) for _ in range(10)))

    one = 200 * 200 * 4
    gc.collect()
    with Live() as live:
        module, _ = deferred(build)
        assert live.peak < 1.2 * one
        values = records(module)
        for name in values:
            values[name]()
        # `materialize` works on one tensor as well.
        assert not is_deferred(materialize(next(module.parameters())))
        assert live.peak < 1.2 * one
        materialize_module(module, CPU)
        assert 10 * one <= live.peak < 11.2 * one


def test_history_dies_with_its_tensor() -> None:
    """What was noted, with the tensors it was made from, is freed at once when the tensor is gone."""
    source = torch.ones(100)
    gone = weakref.ref(source)
    with deferring(CPU, min_numel=64):
        parameter = nn.Parameter(torch.empty(100))
        parameter.data.copy_(source)
        other = parameter.detach() * 2
    gc.disable()
    try:
        del source, parameter
        assert gone() is not None
        assert torch.equal(materialize(other), torch.full((100,), 2.0))
        del other
        assert gone() is None
    finally:
        gc.enable()


def test_contexts_inside_each_other_join() -> None:
    """An inner context joins the outer; reading values inside is exact; the meta device asked for stays meta."""
    torch.manual_seed(0)
    expected = torch.randn(100)
    torch.manual_seed(0)
    with deferring(CPU, min_numel=64):
        with deferring(CPU, min_numel=10**9):
            weight = torch.randn(100)
        assert is_deferred(weight)
        assert torch.equal(materialize(weight), materialize(weight + 0))
        assert weight[3].item() == expected[3].item()
        assert weight.numpy().tolist() == expected.tolist()
        with pytest.raises(ValueError, match="read-only"):
            weight.numpy()[0] = 1
        assert torch.empty(100, device="meta").is_meta
    assert weight.is_meta
    assert torch.equal(materialize(weight), expected)
    assert not is_deferred(torch.randn(100))


def test_default_dtype_is_that_of_the_build() -> None:
    """A tensor is replayed under the default dtype it was built under."""
    torch.set_default_dtype(torch.float64)
    try:
        with deferring(CPU, min_numel=64):
            made = torch.ones(100), torch.arange(100) / 3
    finally:
        torch.set_default_dtype(torch.float32)
    assert [materialize(tensor).dtype for tensor in made] == [torch.float64, torch.float64]
    assert torch.equal(materialize(made[1]), torch.arange(100, dtype=torch.float64) / 3)


def test_what_cannot_be_exact_is_refused() -> None:
    """Tensors without a history, or with one that lacks a change, are refused and the mending is named."""
    with pytest.raises(UnsupportedError, match=r"its values are undefined.*init_module\(empty_init=True\)"):
        materialize(torch.empty(100, device="meta"))
    assert materialize(torch.ones(2)).tolist() == [1, 1]
    module, _ = deferred(lambda: nn.Linear(20, 20))
    with pytest.raises(UnsupportedError, match="its values are undefined"):
        materialize(copy.deepcopy(module).weight)
    with deferring(CPU, min_numel=64):
        init.zeros_(module.weight)
    assert not materialize(module.weight).any()
    init.ones_(module.weight)
    for call in (lambda: materialize_module(module, CPU), lambda: records(module), lambda: materialize(module.weight)):
        with pytest.raises(UnsupportedError, match="'weight' was changed in place after it was built without values"):
            call()
    source = torch.ones(100)
    with deferring(CPU, min_numel=64):
        copied = torch.empty(100).copy_(source)
        with pytest.raises(UnsupportedError, match="has no values to initialise a parameter from"):
            torch.empty(100).copy_(torch.empty(100, device="meta"))
        with pytest.raises(UnsupportedError, match=r"take -tensor.imag instead of tensor.conj\(\).imag"):
            torch.ones(100, dtype=torch.complex64).conj().imag * 2
        with pytest.raises(RuntimeError, match="must match the size"):
            copied + torch.ones(99)
    source.zero_()
    with pytest.raises(UnsupportedError, match="was changed before lite.setup"):
        materialize(copied)
    module, _ = deferred(lambda: nn.Linear(20, 20))
    reference = weakref.ref(module.weight)
    with pytest.raises(UnsupportedError, match="cannot get its values in place"):
        materialize_module(module, CPU)
    assert reference() is module.weight


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_setup_gives_values_in_every_precision(precision: str) -> None:
    """``init_module(empty_init=True)`` and ``setup`` give an eager build; the optimizer made before trains it."""
    with Lite(accelerator="cpu", strategy="single", devices=1, precision=precision) as lite:
        torch.manual_seed(0)
        with lite.init_module():
            reference = nn.Linear(100, 100)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        with lite.init_module(empty_init=True):
            module = nn.Linear(100, 100)
        assert module.weight.is_meta
        assert torch.equal(torch.get_rng_state(), state)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module, optimizer = lite.setup(module, optimizer)
        reference = lite.setup(reference)
        assert torch.equal(module.weight, reference.weight)
        assert module.weight.dtype == reference.weight.dtype
        lite.backward(module(torch.ones(1, 100)).sum())
        optimizer.step()
        assert not torch.equal(module.weight, reference.weight)
        late = lite_built(lite).half()
        with pytest.raises(UnsupportedError, match=r"'weight' is on the meta device and nothing says.*to_empty"):
            lite.setup(late)


def lite_built(lite: Lite) -> nn.Module:
    """A module without values, built by `lite`."""
    with lite.init_module(empty_init=True):
        return nn.Linear(100, 100)
