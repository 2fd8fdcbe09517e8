"""Fabric's ``SingleDeviceStrategy``."""

from __future__ import annotations

from typing import Any

from plugframe.errors import SettingError
from plugframe_builtins._shared.fabric_arguments import refuse_settings
from plugframe_builtins.single.strategy import SingleRank


class SingleDeviceStrategy:
    """Make the strategy ``single``; the device is a setting of the job.

    Args:
        device: the CPU alone.
        options: Fabric's, at their defaults.
    """

    def __new__(cls, device: Any = "cpu", **options: Any) -> SingleRank:  # type: ignore[misc]
        """Return the strategy.

        Raises:
            SettingError: for another device: it is a setting of the job.
        """
        refuse_settings(cls.__name__, options)
        kind, _, index = str(device).partition(":")
        if kind != "cpu":
            raise SettingError(
                f"SingleDeviceStrategy(device={str(device)!r}): pass accelerator={kind!r}, devices=[{index or 0}] to "
                "Fabric, and strategy='single'."
            )
        return SingleRank()
