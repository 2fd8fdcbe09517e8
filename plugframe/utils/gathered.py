"""Tensors that stand for a sharded parameter while it is gathered.

Autograd comes to them in place of the parameter, whose gradient is made of theirs. What looks for the leaves of a graph
must not take them for weights of the script's own.
"""

from __future__ import annotations

from torch import Tensor

_MARK = "_plugframe_gathered"


def mark_gathered(tensor: Tensor) -> None:
    """Note that `tensor` stands for a sharded parameter. Called by a strategy that gathers."""
    setattr(tensor, _MARK, True)


def is_gathered(tensor: Tensor) -> bool:
    """Say whether a tensor stands for a sharded parameter."""
    return _MARK in getattr(tensor, "__dict__", ())
