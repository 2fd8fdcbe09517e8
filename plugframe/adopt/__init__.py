"""Your own objects back: a module, an optimizer, a loader, each itself plus hooks, and itself again after."""

from plugframe.adopt.loader import adopt_loader, release_loader
from plugframe.adopt.module import adopt_module, release_module
from plugframe.adopt.optimizer import adopt_optimizer, release_optimizer
from plugframe.adopt.order import Order
from plugframe.adopt.swap import state_of

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
