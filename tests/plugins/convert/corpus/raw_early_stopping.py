"""Early stopping, a plateau schedule, and the best model saved and loaded."""

# ranks: 2
import os
import tempfile

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(24, 3)
y = x[:, :1] * 2
train_loader = DataLoader(TensorDataset(x[:16], y[:16]), batch_size=8)
val_loader = DataLoader(TensorDataset(x[16:], y[16:]), batch_size=8)
model = nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.8)
scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
path = os.path.join(tempfile.gettempdir(), "best.pt")

best, patience = float("inf"), 0
for epoch in range(6):
    for xb, yb in train_loader:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(xb), yb)
        loss.backward()
        optimizer.step()
    val_loss = 0.0
    with torch.no_grad():
        for xb, yb in val_loader:
            val_loss += nn.functional.mse_loss(model(xb), yb, reduction="sum").item()
    val_loss /= len(val_loader.dataset)
    scheduler.step(val_loss)
    print(epoch, round(val_loss, 5))
    if val_loss < best:
        best = val_loss
        patience = 0
        torch.save(model.state_dict(), path)
    else:
        patience += 1
        if patience >= 2:
            print("stop")
            break

model.load_state_dict(torch.load(path))
with torch.no_grad():
    print("best", round(best, 5), round(model.weight.sum().item(), 5))
