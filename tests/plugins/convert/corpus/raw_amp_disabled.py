"""Mixed precision that a flag turns off, in the old spelling."""

# ranks: 2
import argparse

import torch
from torch import nn
from torch.cuda.amp import GradScaler, autocast
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--amp", action="store_true")
args = parser.parse_args([])
torch.manual_seed(0)
x = torch.randn(16, 4)
loader = DataLoader(TensorDataset(x, x[:, 0].sign()), batch_size=8)
model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
optimizer = torch.optim.NAdam(model.parameters(), lr=0.05)
scaler = GradScaler(enabled=args.amp)
for epoch in range(2):
    total_loss = 0.0
    for inputs, targets in loader:
        optimizer.zero_grad()
        with autocast(enabled=args.amp):
            output = model(inputs)
            loss = nn.functional.soft_margin_loss(output, targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        total_loss += loss.item()
    print(f"Epoch {epoch}: {total_loss / len(loader):.6f}")
