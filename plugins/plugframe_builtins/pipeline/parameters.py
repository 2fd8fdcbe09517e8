"""Gradients of a schedule, kept apart from those of the parameters until the loss's own backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class Aliases:
    """Parameters with the same values as this rank's own, which take their place while a schedule runs.

    The schedule's gradients are those of the aliases: the parameters get theirs from autograd, once, scaled by what the
    script does to the loss, and with the hooks on them.

    Args:
        places: the modules that hold the parameters, with their names there and their stages.
    """

    def __init__(self, places: Iterable[tuple[nn.Module, str, int]]) -> None:
        self._swaps: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        self._stages: dict[int, list[Tensor]] = {}
        made: dict[int, nn.Parameter] = {}
        self.parameters: list[nn.Parameter] = []
        for module, name, stage in places:
            parameter = module._parameters.get(name)
            if parameter is None or not parameter.requires_grad:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = alias = nn.Parameter(parameter.detach())
                vars(alias).update(vars(parameter))
                self.parameters.append(parameter)
                self._stages.setdefault(stage, []).append(alias)
            self._swaps.append((module, name, parameter, made[id(parameter)]))
        self._aliases = list(made.values())

    def of_stage(self, stage: int) -> Sequence[Tensor]:
        """Return the aliases of a stage."""
        return self._stages.get(stage, ())

    def __enter__(self) -> Aliases:
        for module, name, _, alias in self._swaps:
            module._parameters[name] = alias
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, parameter, _alias in self._swaps:
            module._parameters[name] = parameter

    def take_gradients(self) -> list[Tensor | None]:
        """Return the gradients in the order of `parameters`, and forget them."""
        found = [alias.grad for alias in self._aliases]
        for alias in self._aliases:
            alias.grad = None
        return found


class Aside:
    """Set the parameters' own gradients aside, to see what a schedule adds to them past the aliases.

    A recurrent layer computes with its own list of parameters, and not with what the module holds.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._held: list[Tensor | None] = []
        self.added: list[Tensor | None] = []

    def __enter__(self) -> Aside:
        self._held = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return self

    def __exit__(self, *_: object) -> None:
        self.added = [parameter.grad for parameter in self._parameters]
        for parameter, held in zip(self._parameters, self._held, strict=True):
            parameter.grad = held


@torch.no_grad()
def total(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients; each may be missing."""
    if first is None or second is None:
        return second if first is None else first
    return first + second
