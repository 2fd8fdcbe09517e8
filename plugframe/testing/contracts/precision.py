"""The precision contract suite: dtypes, and correctly scaled gradients and steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.errors import PlugframeError, UnsupportedError
from plugframe.testing.contracts.precision_dtypes import DtypeTests
from plugframe.testing.contracts.precision_rules import (
    APART,
    CLEAN,
    CLOSURES,
    DTYPES,
    GRADIENTS,
    IN_PLACE,
    LISTED,
    OVERFLOW,
    REFUSED,
    RETURNED,
    STATE,
    STEPS,
    TRAINING,
    UNTOUCHED,
)
from plugframe.testing.contracts.precision_steps import StepTests
from plugframe.testing.contracts.running import broken, chosen, left, one_line, running, traces

__all__ = [
    "APART",
    "CLEAN",
    "CLOSURES",
    "DTYPES",
    "GRADIENTS",
    "IN_PLACE",
    "LISTED",
    "OVERFLOW",
    "REFUSED",
    "RETURNED",
    "STATE",
    "STEPS",
    "TRAINING",
    "UNTOUCHED",
    "PrecisionContract",
]


class PrecisionContract(DtypeTests, StepTests):
    """Subclass it and set `spec`.

    Attributes:
        tolerance: of a step, relative to plain torch's; by default a few times the rounding error of the dtypes.
    """

    # ------------------------------------------------------------------ state

    def test_its_state_comes_back(self, plugin: Any) -> None:
        """A second object that loads the state continues as the first; an empty state starts over."""
        module = plugin.precision_convert_module(module=self.model())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for factor in (1.0, float("inf"), 1.0):
            optimizer.zero_grad()
            plugin.precision_backward(loss=self.loss(plugin, module, factor), args=(), kwargs={})
            self._step(plugin, optimizer)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.nan_to_num_(nan=0.5)
        optimizer.zero_grad()
        state = plugin.precision_state()
        if not isinstance(state, dict):
            broken(STATE, f"precision_state() gave {state!r}, not a dict")
        for name, value in state.items():
            if not isinstance(value, (str, int, float, bool, Tensor, list, dict, type(None))):
                broken(
                    STATE, f"precision_state()[{name!r}] is a {type(value).__name__}, which a checkpoint cannot hold"
                )
        with self.within() as other:
            copied = copy.deepcopy(state)
            twin = other.precision_convert_module(module=self.model())
            twin.load_state_dict(module.state_dict())
            its = torch.optim.SGD(twin.parameters(), lr=0.1)
            other.precision_load_state(state=copied)
            if repr(other.precision_state()) != repr(state):
                broken(STATE, f"{state} was loaded, and precision_state() then returned {other.precision_state()}")
            for _ in range(3):
                for each, model, stepped in ((plugin, module, optimizer), (other, twin, its)):
                    stepped.zero_grad()
                    each.precision_backward(loss=self.loss(each, model), args=(), kwargs={})
                    self._step(each, stepped)
            for one, two in zip(module.parameters(), twin.parameters(), strict=True):
                if not torch.equal(one, two):
                    broken(STATE, "three steps after loading the parameters are not those of the run it was saved in")
            if repr(other.precision_state()) != repr(plugin.precision_state()):
                broken(
                    STATE, f"three steps after loading it is {other.precision_state()}, not {plugin.precision_state()}"
                )
            try:
                other.precision_load_state(state={})
            except Exception as error:  # noqa: BLE001 - reported as it is
                broken(STATE, f"loading an empty state raised {one_line(error)}")

    def test_two_of_them_do_not_meddle(self, plugin: Any) -> None:
        """An overflow under one object does not change the other's state, and a new set-up starts over."""
        fresh = repr(plugin.precision_state())
        with self.within() as other:
            module = other.precision_convert_module(module=self.model())
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            other.precision_backward(loss=self.loss(other, module, float("inf")), args=(), kwargs={})
            self._step(other, optimizer)
            other.precision_state()  # may update the scale as late as here
            if repr(plugin.precision_state()) != fresh:
                broken(APART, f"an overflow under one object made the other's state {plugin.precision_state()}")
            other.precision_teardown()
            other.precision_setup(context=self.context())
            if repr(other.precision_state()) != fresh:
                broken(CLEAN, f"after a second set-up its state is {other.precision_state()}, not {fresh}")

    # ------------------------------------------------------------------ set-up and tear-down

    def test_what_the_device_cannot_compute_is_refused(self) -> None:
        """Set-up raises, with the precision's name, on a device that supports no dtype."""
        plugin = self.make()
        context = self.context(accelerator_supports_dtype=lambda dtype, device: False)
        try:
            plugin.precision_setup(context=context)
        except UnsupportedError as error:
            if self.entry.name not in str(error):
                broken(REFUSED, f"the message does not name precision {self.entry.name!r}: {error}")
            if "\n" in str(error).strip():
                broken(REFUSED, f"the message has {len(str(error).splitlines())} lines: {error}")
        except Exception as error:  # noqa: BLE001 - reported as it is
            broken(REFUSED, f"set-up raised {one_line(error)}")
        else:
            broken(REFUSED, "the device supports none of its dtypes, and set-up raised nothing")
        finally:
            plugin.precision_teardown()

    def test_set_up_and_tear_down_leave_nothing(self) -> None:
        """Set-up and tear-down, and a tear-down alone, leave the process unchanged."""
        modes = self._modes()
        self.make().precision_teardown()
        with self.within():
            pass  # torch creates some state once in a process
        before = traces()
        with self.within() as plugin:
            module = plugin.precision_convert_module(module=self.model())
            plugin.precision_backward(loss=self.loss(plugin, module), args=(), kwargs={})
        found = left(before, traces())
        if found or self._modes() != modes:
            broken(CLEAN, f"after tear-down {found or f'the modes are {self._modes()}, and were {modes}'}")

    # ------------------------------------------------------------------ a run

    def test_a_run_ends_near_plain_torch(self) -> None:
        """A regression under Lite on one rank ends near plain torch, with losses in the default dtype."""
        with self.within() as plugin:
            allowed = self.allowed(plugin)
        plain = self.model()
        first, last = self._train(plain, torch.optim.SGD(plain.parameters(), lr=0.2), lambda loss: loss.backward())  # type: ignore[no-untyped-call]
        accelerator = self.accelerator[0].qualified
        precision = chosen(self.kind, self.spec, dict(self.options))
        try:
            with running(accelerator=accelerator, precision=precision) as (lite, _):
                model = self.model()
                model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.2))
                begun, ended = self._train(model, optimizer, lite.backward)
                state = lite._hooks.precision_state()
        except PlugframeError as error:
            broken(TRAINING, f"under Lite it raised {one_line(error)}")
        if begun.dtype is not torch.get_default_dtype():
            broken(RETURNED, f"under Lite a loss is {begun.dtype}, the default is {torch.get_default_dtype()}")
        way = float(first - last)
        if not abs(float(ended - last)) <= 16 * allowed * way + way / 10:
            broken(TRAINING, f"in plain torch the loss fell from {first:.4g} to {last:.4g}, under Lite to {ended:.4g}")
        if not isinstance(state, dict):
            broken(STATE, f"precision_state() gave {state!r} under Lite, not a dict")

    def _train(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[[Tensor], Any]
    ) -> tuple[Tensor, Tensor]:
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = self.plain_loss(model)
            backward(loss)
            optimizer.step()
            losses.append(loss.detach())
        return losses[0], losses[-1]
