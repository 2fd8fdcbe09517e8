"""Your own objects back: a module, an optimizer, a loader, each itself plus hooks, and itself again after."""

from plugframe.adopt.module import adopt_module, release_module
from plugframe.adopt.optimizer import adopt_optimizer, release_optimizer
from plugframe.adopt.swap import state_of
from plugframe.data.loader import adopt_loader, release_loader
from plugframe.data.shuffle import Order

__all__ = [
    "Order",
    "adopt_loader",
    "adopt_module",
    "adopt_optimizer",
    "release_loader",
    "release_module",
    "release_optimizer",
    "state_of",
]
