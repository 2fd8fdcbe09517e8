"""The walk of a forward through a module in parts, which a rank without a batch can take too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from plugframe_builtins.deepspeed.library import library


class Walk:
    """Notes in which order a forward gathers and frees the parts of a module, and does the same again.

    Args:
        shim: over the module, set up by DeepSpeed.
        offload: DeepSpeed's, which gathers and frees.
    """

    def __init__(self, shim: nn.Module, offload: Any) -> None:
        self._shim = shim
        self._offload = offload
        self._steps: list[tuple[nn.Module, bool]] = []
        self._handles: list[Any] = []
        for part in shim.modules():
            self._handles.append(part.register_forward_pre_hook(self._come))
            self._handles.append(part.register_forward_hook(self._go))

    def _come(self, part: nn.Module, args: Any) -> None:
        if part is self._shim:
            self._steps.clear()
        self._steps.append((part, True))

    def _go(self, part: nn.Module, args: Any, result: Any) -> None:
        self._steps.append((part, False))

    @torch.no_grad()
    def help(self) -> None:
        """Gather what another rank's forward gathers, and free it."""
        running: list[Any] = library("runtime.zero.parameter_offload").FWD_MODULE_STACK
        self._steps = self._steps or list(_assumed(self._shim))
        self._offload.get_param_coordinator().reset_step()
        come: Callable[[nn.Module], None] = self._offload.pre_sub_module_forward_function
        go: Callable[[nn.Module], None] = self._offload.post_sub_module_forward_function
        for part, comes in self._steps:
            if comes:
                come(part)
            else:
                running.pop()
                go(part)

    def order(self) -> list[int]:
        """Return in which order the last forward came to the parts."""
        number = {id(part): position for position, part in enumerate(self._shim.modules())}
        return [number[id(part)] for part, comes in self._steps if comes]

    def close(self) -> None:
        """Note nothing any more."""
        for handle in self._handles:
            handle.remove()


def _assumed(part: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Return the walk of a forward that runs every part in the order in which it was made."""
    inner = [step for child in part.children() for step in _assumed(child)]
    if isinstance(part, (nn.ModuleList, nn.ModuleDict)):
        return inner
    return [(part, True), *inner, (part, False)]
