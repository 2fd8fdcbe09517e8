"""Mark tensors that replace a sharded parameter while it is gathered.

Autograd reaches them instead of the parameter, and the parameter's gradient is computed from theirs. Code that walks a
graph's leaves must not mistake them for weights of the script.
"""

from __future__ import annotations

from torch import Tensor

_ATTRIBUTE = "_plugframe_gathered"


def mark_gathered(tensor: Tensor) -> None:
    """Mark `tensor` as a gathered parameter. Called by strategies that gather."""
    setattr(tensor, _ATTRIBUTE, True)


def is_gathered(tensor: Tensor) -> bool:
    """Return whether a tensor is a gathered parameter."""
    return _ATTRIBUTE in getattr(tensor, "__dict__", ())
