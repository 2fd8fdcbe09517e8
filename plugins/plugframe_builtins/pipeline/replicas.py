"""Average gradients over the pipelines of a job, which hold the same stages and read different samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plugframe_builtins.pipeline.stand_in import OtherParameter


class Replicas:
    """The ranks that hold the same stages as this one.

    Args:
        group: their process group.
        size: how many they are.
        hooks: the hooks of the job, for collectives.

    Attributes:
        local: whether accumulated gradients are not averaged yet.
    """

    def __init__(self, group: Any, size: int, hooks: Any) -> None:
        self._group, self._hooks = group, hooks
        self.size = size
        self.local = False
        self._averages = True

    @contextmanager
    def averaging(self, enabled: bool) -> Iterator[None]:
        """Average after each backward within the context, or leave gradients to this rank."""
        before, self._averages = self._averages, enabled
        try:
            yield
        finally:
            self._averages = before

    @torch.no_grad()
    def average(self, modules: Iterable[nn.Module]) -> None:
        """Make the gradients of this rank's stages the mean over all replicas; called after each backward.

        A gradient that was averaged before is equal on all of them, and stays what it is.
        """
        if not self._averages:
            self.local = True
            return
        self.local = False
        kinds: dict[Any, list[nn.Parameter]] = {}
        for parameter in dict.fromkeys(p for module in modules for p in module.parameters()):
            if parameter.requires_grad and not isinstance(parameter, OtherParameter):
                kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for parameters in kinds.values():
            self._average(parameters)

    def _average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average gradients of one dtype and device in one reduction; of none on any replica stays None."""
        there = torch.tensor([float(p.grad is not None) for p in parameters])
        flags = there.to(parameters[0].device, parameters[0].dtype)
        flat = torch.cat([*(self._flat(p) for p in parameters), flags])
        mean: Tensor = self._hooks.collective_all_reduce(tensor=flat, op="mean", group=self._group)
        *means, flags = torch.split(mean, [*(p.numel() for p in parameters), len(parameters)])
        for parameter, value, used in zip(parameters, means, flags.tolist(), strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(value.view_as(parameter))
            elif used:
                parameter.grad = value.view_as(parameter).clone()

    @staticmethod
    def _flat(parameter: nn.Parameter) -> Tensor:
        gradient = parameter.grad
        return parameter.new_zeros(parameter.numel()) if gradient is None else gradient.reshape(-1)
