"""Snapshot the state before a step, to restore it before a retry."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.hooks.context import Context

#: Use of a parameter by a step: no gradient, one from before the step, one of its own.
NONE, OLD, NEW = 0, 1, 2


class Before:
    """A snapshot of gradients, buffers and generators; the parameters have none during the step.

    Attributes:
        parameters: those that had gradients.
        gradients: the accumulated gradient of each parameter, None for none.
    """

    def __init__(self, context: Context, modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> None:
        self._context = context
        self.parameters = parameters
        # Copied: running statistics change in place.
        self._buffers = [(buffer, buffer.detach().clone()) for module in modules for buffer in module.buffers()]
        self._generators = _generators(context)
        self.gradients = [parameter.grad for parameter in parameters]
        self.forget()

    def forget(self, use: Mapping[int, int] | None = None) -> None:
        """Drop the gradients of all parameters, or of those unused on every rank."""
        for parameter in self.parameters:
            if use is None or use.get(id(parameter)) == NONE:
                parameter.grad = None

    def uses(self) -> dict[int, int]:
        """Return the step's use of each parameter, by id."""
        pairs = zip(self.parameters, self.gradients, strict=True)
        return {id(p): NEW if p.grad is not None else NONE if old is None else OLD for p, old in pairs}

    @torch.no_grad()
    def again(self) -> None:
        """Restore everything except the gradients."""
        self.forget()
        for buffer, value in self._buffers:
            buffer.copy_(value)
        _set_generators(self._context, self._generators)

    def restore(self) -> None:
        """Restore the gradients only."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the new gradients to the earlier ones."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)


def _generators(context: Context) -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy.random")
    device = context.hooks.accelerator_rng_state(device=context.device)
    return torch.get_rng_state(), random.getstate(), numpy.get_state() if numpy else None, device


def _set_generators(context: Context, states: tuple[Tensor, Any, Any, Tensor | None]) -> None:
    of_torch, of_python, of_numpy, of_device = states
    torch.set_rng_state(of_torch)
    random.setstate(of_python)
    numpy: Any = sys.modules.get("numpy.random")
    if of_numpy is not None:
        numpy.set_state(of_numpy)
    if of_device is not None:
        context.hooks.accelerator_set_rng_state(state=of_device, device=context.device)
