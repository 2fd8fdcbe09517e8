"""A round: local optimizer steps, followed by one outer step on the average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Round:
    """The current round of one optimizer, and its outer optimizer: SGD on the change of the round.

    With a learning rate of 1 and no momentum the outer step takes the average and needs no state.

    Attributes:
        steps: local steps in this round.
        momentum: momentum of the outer optimizer, by parameter.
    """

    def __init__(self, *, lr: float, momentum: float) -> None:
        self._lr, self._mu = lr, momentum
        self._anchors: dict[nn.Parameter, Tensor] = {}
        self.steps = 0
        self.momentum: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def begin(self, parameters: Sequence[nn.Parameter]) -> None:
        """Save the parameters at the beginning of a round, which are equal on all ranks."""
        if self._lr == 1 and self._mu == 0:
            return
        for parameter in parameters:
            if parameter in self._anchors:
                self._anchors[parameter].copy_(parameter)
            else:
                self._anchors[parameter] = parameter.detach().clone()

    @torch.no_grad()
    def end(self, parameters: Sequence[nn.Parameter], means: Sequence[Tensor]) -> None:
        """Run the outer step, given the means of the parameters over ranks."""
        self.steps = 0
        for parameter, mean in zip(parameters, means, strict=True):
            # A parameter added to the optimizer during the round has no anchor: it takes the average.
            anchor = self._anchors.get(parameter)
            if anchor is None:
                parameter.copy_(mean)
                continue
            gradient = anchor - mean
            if self._mu:
                buffer = self.momentum.setdefault(parameter, torch.zeros_like(parameter, requires_grad=False))
                buffer.mul_(self._mu).add_(gradient)
                gradient.add_(buffer, alpha=self._mu)
            parameter.copy_(anchor.sub_(gradient, alpha=self._lr))


def trained(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the optimizer's parameters that require gradients."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
