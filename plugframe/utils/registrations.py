"""Detect parameters and modules registered in modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)


class Registrations:
    """Counts registrations of parameters and modules in any module, to detect changed parameters."""

    def __init__(self) -> None:
        self.count = 0

    def watch(self) -> Callable[[], None]:
        """Start counting; return a function that stops it."""
        handles = (
            register_module_parameter_registration_hook(self._increment),
            register_module_module_registration_hook(self._increment),
        )

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end

    def _increment(self, module: nn.Module, name: str, value: Any) -> None:
        self.count += 1
