"""A loss that counts nothing and is not finite: a mean over no tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def without_gradients(loss: Tensor) -> tuple[Tensor, list[Any]]:
    """Return 0 in place of `loss`, and handles of hooks that make every gradient of its graph 0.

    Multiplied by a weight of 0 a NaN stays NaN, in the gradients as well.
    """
    zero = loss.nan_to_num(0.0, 0.0, 0.0) * 0.0
    nodes, seen, handles = [zero.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        handles.append(node.register_prehook(_zeros))
        nodes += [following for following, _ in node.next_functions]
    return zero, handles


def _zeros(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else torch.zeros_like(gradient) for gradient in gradients)
