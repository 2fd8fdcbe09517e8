"""Precision contract tests of gradients and optimizer steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from plugframe.errors import UnsupportedError
from plugframe.testing.contracts.precision_bench import PrecisionBench, gradients_of, moved
from plugframe.testing.contracts.precision_rules import CLOSURES, GRADIENTS, OVERFLOW, STEPS
from plugframe.testing.contracts.running import broken, one_line


class StepTests(PrecisionBench):
    """Tests of scaling, overflow, closures and steps, against plain torch."""

    def test_gradients_are_true_to_size(self, plugin: Any) -> None:
        """Unscaled gradients equal plain torch's, with accumulation, and after a second unscale."""
        module, plain = plugin.precision_convert_module(module=self.model()), self.model()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for count in (1, 2):
            plugin.precision_backward(loss=self.loss(plugin, module), args=(), kwargs={})
            self.plain_loss(plain).backward()  # type: ignore[no-untyped-call]
            for time in ("", ", unscaled a second time"):
                plugin.precision_unscale(optimizer=optimizer)
                self._near(
                    GRADIENTS, plugin, gradients_of(module), gradients_of(plain), f"after {count} backwards{time}"
                )

    def test_backward_takes_its_arguments(self, plugin: Any) -> None:
        """``retain_graph=True`` reaches backward: a second backward through the graph works."""
        module, plain = plugin.precision_convert_module(module=self.model()), self.model()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        loss, other = self.loss(plugin, module), self.plain_loss(plain)
        try:
            for _ in range(2):
                plugin.precision_backward(loss=loss, args=(), kwargs={"retain_graph": True})
                other.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            broken(GRADIENTS, f"backward(retain_graph=True) twice raised {one_line(error)}")
        plugin.precision_unscale(optimizer=optimizer)
        self._near(
            GRADIENTS, plugin, gradients_of(module), gradients_of(plain), "after two backwards through one graph"
        )

    @pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
    def test_steps_are_those_of_plain_torch(self, plugin: Any, clip: bool) -> None:
        """Steps, with and without unscaling and clipping, move the parameters as plain torch does."""
        module, plain = plugin.precision_convert_module(module=self.model()), self.model()
        optimizer, other = (torch.optim.SGD(each.parameters(), lr=0.5) for each in (module, plain))
        for _ in range(3):
            optimizer.zero_grad()
            other.zero_grad()
            plugin.precision_backward(loss=self.loss(plugin, module), args=(), kwargs={})
            self.plain_loss(plain).backward()  # type: ignore[no-untyped-call]
            if clip:
                plugin.precision_unscale(optimizer=optimizer)
                for each in (module, plain):
                    nn.utils.clip_grad_norm_(each.parameters(), 0.1)
            self._step(plugin, optimizer)
            other.step()
        self._near(STEPS, plugin, moved(module, self.model()), moved(plain, self.model()), "3 steps of SGD", few=8)

    def test_two_optimizers_take_their_own_steps(self, plugin: Any) -> None:
        """Two models with an optimizer each, trained in turns, move as in plain torch."""
        modules = [plugin.precision_convert_module(module=self.model()) for _ in range(2)]
        plains = [self.model() for _ in range(2)]
        optimizers, others = ([torch.optim.SGD(m.parameters(), lr=0.5) for m in each] for each in (modules, plains))
        for _ in range(2):
            for number, (module, plain) in enumerate(zip(modules, plains, strict=True), 1):
                plugin.precision_backward(loss=self.loss(plugin, module, number), args=(), kwargs={})
                self.plain_loss(plain, number).backward()  # type: ignore[no-untyped-call]
            for optimizer, other in zip(optimizers, others, strict=True):
                self._step(plugin, optimizer)
                other.step()
                optimizer.zero_grad()
                other.zero_grad()
        for module, plain in zip(modules, plains, strict=True):
            self._near(STEPS, plugin, moved(module, self.model()), moved(plain, self.model()), "two optimizers", few=8)

    def test_an_overflow_is_skipped_or_shown(self, plugin: Any) -> None:
        """If unscale returns True for non-finite gradients, the step changes nothing; the next step does."""
        module = plugin.precision_convert_module(module=self.model())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        before = copy.deepcopy(module.state_dict())
        plugin.precision_backward(loss=self.loss(plugin, module, float("inf")), args=(), kwargs={})
        skips = plugin.precision_unscale(optimizer=optimizer)
        if not isinstance(skips, bool):
            broken(OVERFLOW, f"precision_unscale() gave {skips!r}, not True or False")
        if all(grad.isfinite().all() for grad in gradients_of(module)):
            broken(OVERFLOW, "an infinite loss left finite gradients: the overflow would go unnoticed")
        self._step(plugin, optimizer)
        changed = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
        if skips and changed:
            broken(OVERFLOW, f"precision_unscale() returned True, and the step changed {', '.join(changed)}")
        if not skips:
            if not changed:
                broken(
                    OVERFLOW, "precision_unscale() returned False, and the step was skipped: clipping would have raised"
                )
            return
        optimizer.zero_grad()
        plugin.precision_backward(loss=self.loss(plugin, module), args=(), kwargs={})
        self._step(plugin, optimizer)
        if all(torch.equal(value, before[name]) for name, value in module.state_dict().items()):
            broken(OVERFLOW, "after a skipped step the next one, on finite gradients, was skipped too")

    def test_a_closure_is_evaluated_or_refused(self, plugin: Any) -> None:
        """The step returns the closure's loss, or raises an UnsupportedError."""
        module = plugin.precision_convert_module(module=self.model())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        calls: list[float] = []

        def closure() -> float:
            optimizer.zero_grad()
            loss = self.loss(plugin, module)
            plugin.precision_backward(loss=loss, args=(), kwargs={})
            calls.append(loss.item())
            return calls[-1]

        try:
            found = plugin.precision_optimizer_step(optimizer=optimizer, step=optimizer.step, closure=closure)
        except UnsupportedError:
            if calls:
                broken(CLOSURES, "it was refused after it had been evaluated")
            return
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(CLOSURES, f"it raised {one_line(error)}")
        if len(calls) != 1 or found != calls[0]:
            broken(CLOSURES, f"it was evaluated {len(calls)} times, gave {calls}, and the step returned {found!r}")

    def test_a_step_without_gradients_does_nothing(self, plugin: Any) -> None:
        """Unscaling and a step accept an optimizer whose parameters have no gradients."""
        module = plugin.precision_convert_module(module=self.model())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        before = copy.deepcopy(module.state_dict())
        try:
            plugin.precision_unscale(optimizer=optimizer)
            self._step(plugin, optimizer)
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(STEPS, f"a step without any gradient raised {one_line(error)}")
        if any(not torch.equal(value, before[name]) for name, value in module.state_dict().items()):
            broken(STEPS, "a step without any gradient moved parameters")
