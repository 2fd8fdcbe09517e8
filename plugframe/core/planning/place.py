"""Where plugins have to work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from plugframe.hooks.descriptor import Plugin


@dataclass(frozen=True)
class Where:
    """A device type and a number of ranks."""

    device_type: str
    world_size: int

    def __str__(self) -> str:
        return f"{self.world_size} rank{'s' if self.world_size > 1 else ''} on {self.device_type}"

    def misfit(self, descriptor: Plugin, needs: Iterable[str] = ()) -> str | None:
        """Say why a plugin does not work here, or does not provide what is needed; None if it does both."""
        lacking = [capability for capability in needs if capability not in descriptor.provides]
        if lacking:
            return f"does not provide {', '.join(map(repr, lacking))}"
        if descriptor.ranks == "one" and self.world_size > 1:
            return f"works with one rank, and there are {self.world_size}"
        if descriptor.devices and self.device_type not in descriptor.devices:
            return f"works on {', '.join(descriptor.devices)}, and the device is {self.device_type}"
        return None
