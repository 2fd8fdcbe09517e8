"""Automatic mixed precision in bfloat16."""

# ranks: 2
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# tolerance: 0.02
torch.manual_seed(0)
x = torch.randn(16, 8)
loader = DataLoader(TensorDataset(x, x.norm(dim=1, keepdim=True)), batch_size=8)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
for epoch in range(3):
    for inputs, targets in loader:
        optimizer.zero_grad()
        with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
            outputs = model(inputs)
            loss = nn.functional.mse_loss(outputs, targets)
        loss.backward()
        optimizer.step()
    print(f"{epoch} {loss.item():.4f}")
