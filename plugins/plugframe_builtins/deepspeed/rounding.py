"""Frozen parameters that DeepSpeed rounds: it keeps a float32 copy of trained ones only."""

from __future__ import annotations

import torch
from torch import nn

from plugframe.utils.logging import warn_caller


class Rounding:
    """Find frozen parameters of a module whose values change.

    Args:
        dtype: of DeepSpeed's copy, None if it keeps the parameters' own.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        self._module = module
        self._dtype = dtype
        self._changed: list[nn.Parameter] = []

    @torch.no_grad()
    def note(self, parameter: nn.Parameter) -> None:
        """Look at a parameter, before it is converted."""
        if self._dtype is None or parameter.requires_grad or parameter.dtype is not torch.float32:
            return
        if not torch.equal(parameter.to(self._dtype).float(), parameter):
            self._changed.append(parameter)

    def warn(self) -> None:
        """Say once which ones were found."""
        if not self._changed:
            return
        changed = set(map(id, self._changed))
        name = next(name for name, parameter in self._module.named_parameters() if id(parameter) in changed)
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        warn_caller(
            f"Frozen parameter {name!r}{more} of {type(self._module).__name__} is float32, and strategy 'deepspeed' "
            f"rounds it to {str(self._dtype).removeprefix('torch.')}, in what is saved too: save trained parameters "
            "only, convert the frozen ones before lite.setup(), or use strategy='ddp' or 'fsdp'."
        )
