"""Adopt a module or an optimizer in place: the same object with added behaviour, and release it again."""

from plugframe.adopt.module import adopt_module, release_module
from plugframe.adopt.optimizer import adopt_optimizer, release_optimizer
from plugframe.utils.swap import state_of

__all__ = [
    "adopt_module",
    "adopt_optimizer",
    "release_module",
    "release_optimizer",
    "state_of",
]
