"""What was before a step: put back before it is tried again."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.hooks.context import Context

#: What a step has to do with a parameter: no gradient at all, one from before the step, one of its own.
NONE, OLD, NEW = 0, 1, 2


class Before:
    """Gradients, buffers and generators as they were when this was made; the gradients are set aside meanwhile.

    Attributes:
        parameters: whose gradients are set aside.
        gradients: what each of the parameters had accumulated, None for nothing.
    """

    def __init__(self, context: Context, modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> None:
        self._context = context
        self.parameters = parameters
        # Copied: a normalisation's running statistics change in place.
        self._buffers = [(buffer, buffer.detach().clone()) for module in modules for buffer in module.buffers()]
        self._generators = _generators(context)
        self.gradients = [parameter.grad for parameter in parameters]
        self.forget()

    def forget(self, use: Mapping[int, int] | None = None) -> None:
        """Drop the gradients of all parameters, or of those without any use on any rank."""
        for parameter in self.parameters:
            if use is None or use.get(id(parameter)) == NONE:
                parameter.grad = None

    def uses(self) -> dict[int, int]:
        """Return what the step had to do with each parameter, by its id."""
        pairs = zip(self.parameters, self.gradients, strict=True)
        return {id(p): NEW if p.grad is not None else NONE if old is None else OLD for p, old in pairs}

    @torch.no_grad()
    def again(self) -> None:
        """Make everything as it was, with the gradients still set aside."""
        self.forget()
        for buffer, value in self._buffers:
            buffer.copy_(value)
        _set_generators(self._context, self._generators)

    def restore(self) -> None:
        """Give the parameters back the gradients they had, and nothing else."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients that were computed since to those that were there."""
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
