"""A precision that is set up, and the model that the contract tests train with it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from plugframe.core.registry.registry import Entry
from plugframe.errors import UnsupportedError
from plugframe.hooks.context import Context
from plugframe.testing.contracts.base import PluginContract
from plugframe.testing.contracts.placed import accelerator_for, context_of
from plugframe.testing.contracts.running import broken


class PrecisionBench(PluginContract):
    """The fixtures of `PrecisionContract`."""

    kind = "precision"
    tolerance: ClassVar[float | None] = None

    def context(self, **hooks: Any) -> Context:
        """Return the context of a job of one rank."""
        entry, accelerator = self.accelerator
        device = accelerator.accelerator_device(index=0)
        names = {"accelerator": entry.name, self.kind: self.entry.name}
        return context_of(accelerator, device=device, names=names, **hooks)

    @functools.cached_property
    def accelerator(self) -> tuple[Entry, Any]:
        """The accelerator of the tests."""
        entry = accelerator_for(self.descriptor)
        return entry, self.registry.make(entry)

    @contextmanager
    def within(self) -> Iterator[Any]:
        """Yield a plugin that is set up; the test is skipped if this device does not support it."""
        plugin, context = self.make(), self.context()
        try:
            plugin.precision_setup(context=context)
        except UnsupportedError as error:
            pytest.skip(f"It is not supported here: {error}")
        try:
            yield plugin
        finally:
            plugin.precision_teardown()

    @pytest.fixture
    def plugin(self) -> Iterator[Any]:
        """A plugin that is set up."""
        with self.within() as plugin:
            yield plugin

    @functools.cached_property
    def device(self) -> torch.device:
        """The device of the tests."""
        return self.context().device

    def allowed(self, plugin: Any) -> float:
        """Return the relative tolerance against plain torch."""
        if self.tolerance is not None:
            return self.tolerance
        dtypes = plugin.precision_dtypes()
        widest = max(torch.finfo(dtype).eps for dtype in (dtypes.parameter, dtypes.compute, torch.float32))
        return 32 * widest

    def model(self) -> nn.Module:
        """Return a module with fixed weights, on the device of the tests."""
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(self.device)

    def data(self) -> tuple[Tensor, Tensor]:
        """Return fixed inputs (16, 6) and targets (16, 4)."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(16, 6, generator=generator)
        return x.to(self.device), torch.randn(16, 4, generator=generator).to(self.device)

    def loss(self, plugin: Any, module: nn.Module, factor: float = 1.0) -> Tensor:
        """Run a forward as `Lite` does, and return the loss."""
        x, y = self.data()
        x = plugin.precision_convert_input(data=x)
        with plugin.precision_forward_context():
            out = module(x)
        out = plugin.precision_convert_output(data=out)
        return nn.functional.mse_loss(out, y) * factor

    def plain_loss(self, module: nn.Module, factor: float = 1.0) -> Tensor:
        """Return the loss in plain torch, a 0-d tensor."""
        x, y = self.data()
        return nn.functional.mse_loss(module(x), y) * factor

    def _modes(self) -> tuple[Any, ...]:
        """Return torch's settings that a precision may change: default dtype, autocast and matmul precision."""
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind) if torch.amp.is_autocast_available(kind) else None
        return torch.get_default_dtype(), autocast, torch.get_float32_matmul_precision()

    def _step(self, plugin: Any, optimizer: torch.optim.Optimizer) -> Any:
        return plugin.precision_optimizer_step(optimizer=optimizer, step=optimizer.step, closure=None)

    def _near(self, rule: str, plugin: Any, ours: list[Tensor], theirs: list[Tensor], what: str, few: int = 1) -> None:
        """Check that each tensor is within `few` times `allowed` of plain torch's, relative to its norm."""
        if len(ours) != len(theirs):
            broken(rule, f"{what}: {len(ours)} parameters have gradients, in plain torch {len(theirs)}")
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            size = float(other.double().norm())
            apart = float((one.double() - other.double()).norm())
            if not apart <= few * self.allowed(plugin) * size:
                broken(rule, f"{what}: parameter {number} is {apart:.3g} from plain torch's {size:.3g}")


def gradients_of(module: nn.Module) -> list[Tensor]:
    """Return copies of the gradients, in the order of the parameters."""
    return [parameter.grad.detach().clone() for parameter in module.parameters() if parameter.grad is not None]


def moved(module: nn.Module, begun: nn.Module) -> list[Tensor]:
    """Return the change of each parameter since `begun`, in float64."""
    pairs = zip(module.parameters(), begun.parameters(), strict=True)
    return [one.detach().double() - other.detach().double() for one, other in pairs]
