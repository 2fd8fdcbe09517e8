"""Train a small model with the plugin: plugframe run train.py --plugins=ema"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from plugframe import Lite

with Lite() as lite:
    lite.seed_everything(0)
    x = torch.randn(256, 8)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.2))
    loader = lite.setup_dataloaders(DataLoader(data, batch_size=32, shuffle=True))
    ema = lite.extension("ema")
    for epoch in range(5):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            lite.backward(loss)
            optimizer.step()
        x, y = data.tensors
        with torch.no_grad():
            last = nn.functional.mse_loss(model(x.to(lite.device)), y.to(lite.device))
            with ema.averaged(model):
                average = nn.functional.mse_loss(model(x.to(lite.device)), y.to(lite.device))
        lite.print(f"epoch {epoch}: loss {float(last):.4f}, of the averages {float(average):.4f}")
