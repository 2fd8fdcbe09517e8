"""An exponential moving average of the weights, kept in a copy of the model."""

# ranks: 2
import copy

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class EMA:
    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval()
        self.decay = decay
        for p in self.model.parameters():
            p.requires_grad_(False)

    @torch.no_grad()
    def update(self, model):
        for ours, theirs in zip(self.model.parameters(), model.parameters()):
            ours.mul_(self.decay).add_(theirs, alpha=1 - self.decay)


torch.manual_seed(0)
x = torch.randn(24, 4)
y = x[:, :2] ** 2
loader = DataLoader(TensorDataset(x, y), batch_size=8)
model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
ema = EMA(model, 0.9)
for epoch in range(2):
    for xb, yb in loader:
        loss = (model(xb) - yb).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
    print(epoch, f"{loss.item():.6f}")
with torch.no_grad():
    print("average", f"{(ema.model(x) - y).pow(2).mean().item():.6f}")
