"""A short training run with an extension, on one rank and on two."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from plugframe.hooks.world import World
from plugframe.testing.contracts import states
from plugframe.testing.contracts.running import chosen, running


def train(plugins: list[Any], *, alone: bool = True, fails: bool = False) -> dict[str, Any]:
    """Train a small model with extensions; return losses and weights.

    Raises:
        ZeroDivisionError: in the middle, if `fails`.
    """
    with tempfile.TemporaryDirectory() as folder, running(alone=alone, plugins=tuple(plugins)) as (lite, _):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        data = torch.linspace(-1, 1, 48).reshape(12, 4)
        rows: Any = data  # a tensor is a dataset
        loader = lite.setup_dataloaders(DataLoader(rows, batch_size=2))
        losses = []
        for batch in loader:
            optimizer.zero_grad()
            loss = model(batch).pow(2).mean()
            lite.backward(loss)
            lite.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            losses.append(float(lite.all_reduce(loss.detach())))
            if fails:
                raise ZeroDivisionError("a training that fails")
        path = lite.broadcast(os.path.join(folder, "checkpoint"))
        lite.save(path, {"model": model})
        lite.load(path, {"model": model})
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        lite.barrier()
    return {"losses": losses, "weights": weights}


def train_on_ranks(world: World, spec: str, options: dict[str, Any], folder: str) -> str:
    """Train with and without the extension; describe the differences. Every rank must call it."""
    os.chdir(folder)
    plain = train([], alone=False)
    watched = train([chosen("extension", spec, options)], alone=False)
    differs = states.difference(plain, watched)
    return f"training with it differs: {differs}" if differs else ""
