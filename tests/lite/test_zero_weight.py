"""A loss that is a mean over no tokens."""

from __future__ import annotations

import torch
from torch import nn

from plugframe.lite.zero_weight import without_gradients


def test_a_mean_over_nothing_has_gradients_of_zero() -> None:
    """The loss is 0 and so are all gradients, where a product with 0 would be NaN."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    mask = torch.zeros(2, dtype=torch.bool)
    loss = (model(torch.ones(2, 3)).sum(1) * mask).sum() / mask.sum()
    assert loss.isnan()
    zero, handles = without_gradients(loss)
    zero.backward()
    for handle in handles:
        handle.remove()
    assert zero == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
