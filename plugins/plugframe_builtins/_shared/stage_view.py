"""A model as the ranks of one of its stages see it: for strategies that transform modules beside a pipeline."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

#: Attribute of a view with the complete model.
_COMPLETE = "_plugframe_complete"


def complete_model(module: nn.Module) -> nn.Module:
    """Return the complete model if `module` is the view of a stage, else `module` itself.

    Its modules of other stages have names and shapes, and no values: to check a plan for all stages on all ranks.
    """
    found: nn.Module = vars(module).get(_COMPLETE, module)
    return found


class StageView:
    """The modules of a model that are in one stage, under their paths in the complete model.

    Args:
        model: the complete model.
        units: the stages of its modules, by path, without those within others.
        stage: that one.

    Attributes:
        module: shows the model without the modules of other stages.
    """

    def __init__(self, model: nn.Module, units: Mapping[str, int], stage: int) -> None:
        self._units, self._stage = units, stage
        self._copies: list[tuple[nn.Module, nn.Module]] = []
        shown = self._shown("", model)
        assert shown is not None
        self.module = shown
        vars(self.module)[_COMPLETE] = model

    def put_back(self) -> None:
        """Take over into the complete model what replaced its modules in the view."""
        copies = {id(made) for made, _ in self._copies}
        for made, original in self._copies:
            original._modules.update((name, part) for name, part in made._modules.items() if id(part) not in copies)

    def _shown(self, path: str, part: nn.Module) -> nn.Module | None:
        if path in self._units:
            return part if self._units[path] == self._stage else None
        if next(part.parameters(), None) is None and path:
            return part
        prefix = f"{path}." * bool(path)
        made: Any = object.__new__(type(part))
        # Parameters, buffers and hooks are those of the original: the dicts are shared.
        vars(made).update(vars(part))
        shown = {name: self._shown(prefix + name, child) for name, child in part._modules.items() if child is not None}
        made.__dict__["_modules"] = {name: child for name, child in shown.items() if child is not None}
        self._copies.append((made, part))
        return made  # type: ignore[no-any-return]


def meta_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module without values, on the meta device: it computes shapes."""
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)
