"""The plugin: collectives over ``torch.distributed``."""

from __future__ import annotations

from plugframe_builtins._shared.torch_collective.collective import TorchCollective

__all__ = ["TorchCollective"]
