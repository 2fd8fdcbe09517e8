"""What a user writes must satisfy strict type checkers; this file is checked, never run."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from plugframe import Lite


def train() -> float:
    lite = Lite(strategy="ddp", devices=2, precision="bf16")
    lite.seed_everything(1)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = lite.setup(model, optimizer)
    loader = lite.setup_dataloaders(DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2))
    loss = torch.zeros(())
    for (batch,) in loader:
        optimizer.zero_grad()
        with lite.no_backward_sync(model, enabled=False):
            loss = model(batch).mean()
            lite.backward(loss)
        lite.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
    state = {"model": model, "step": 1}
    lite.save("last.safetensors", state)
    rest: dict[str, object] = lite.load("last.safetensors", state)
    lite.print(rest)
    total: torch.Tensor = lite.all_reduce(loss, reduce_op="sum")
    return float(total)
