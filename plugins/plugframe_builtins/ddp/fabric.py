"""Fabric's ``DDPStrategy``."""

from __future__ import annotations

from typing import Any

from plugframe_builtins._shared.fabric_arguments import refuse_settings, refuse_unknown
from plugframe_builtins.ddp.strategy import DDP

_KNOWN = (
    "find_unused_parameters",
    "static_graph",
    "gradient_as_bucket_view",
    "bucket_cap_mb",
    "broadcast_buffers",
    "process_group",
)


class DDPStrategy:
    """Make the strategy `DDP` from the arguments of Fabric's ``DDPStrategy``.

    Args:
        options: those of ``torch.nn.parallel.DistributedDataParallel``, and Fabric's own at their defaults.
    """

    def __new__(cls, **options: Any) -> DDP:  # type: ignore[misc]
        """Return the strategy.

        Raises:
            SettingError: for an argument that is a setting of the job, or has no counterpart.
        """
        options = refuse_settings(cls.__name__, options)
        refuse_unknown(cls.__name__, options, _KNOWN)
        return DDP(**options)
