"""Noticing that parameters or modules were put into a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)


class Registrations:
    """Counts parameters and modules that were put into any module: a model may have got other parameters since."""

    def __init__(self) -> None:
        self.count = 0

    def watch(self) -> Callable[[], None]:
        """Begin to count; return what ends it."""
        handles = (
            register_module_parameter_registration_hook(self._note),
            register_module_module_registration_hook(self._note),
        )

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end

    def _note(self, module: nn.Module, name: str, value: Any) -> None:
        self.count += 1
