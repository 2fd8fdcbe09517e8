"""Train a small model: plugframe run train.py --precision=torchao-qat"""

import torch
from torch import nn

from plugframe import Lite

with Lite() as lite:
    lite.seed_everything(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    x = lite.to_device(torch.randn(256, 32))
    for _ in range(50):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x[:, :16])
        lite.backward(loss)
        optimizer.step()
    lite.print(f"loss {float(loss):.4f}")
    final = lite.finalize(model)
    lite.print(f"weights: {type(final.get_parameter('0.weight')).__name__}")
