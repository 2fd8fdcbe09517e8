"""A chip that is the processor, so that it works everywhere."""

from __future__ import annotations

from plugframe.base import Accelerator
from plugframe.hooks import hookimpl


class AcmeChip(Accelerator):
    """Shared by any number of ranks."""

    device_type = "cpu"
    indexed = False

    @hookimpl
    def accelerator_is_available(self) -> bool:
        return True

    @hookimpl
    def accelerator_collective_backend(self) -> str:
        return "gloo"
