"""Train a replica: plugframe run train.py --devices=1 --strategy=torchft --strategy.lighthouse=http://localhost:29510"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from plugframe import Lite

with Lite() as lite:
    lite.seed_everything(0)
    x = torch.randn(256, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    loader = lite.setup_dataloaders(DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16, shuffle=True))
    for epoch in range(5):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            lite.backward(loss)
            optimizer.step()
        lite.print(f"epoch {epoch}: loss {float(loss):.4f}")
