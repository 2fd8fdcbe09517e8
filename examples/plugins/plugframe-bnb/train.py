"""Train adapters of a small model: plugframe run train.py --precision=bnb-nf4"""

import torch
from torch import nn

from plugframe import Lite

with Lite() as lite:
    lite.seed_everything(0)
    model = lite.setup(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = lite.setup_optimizers(torch.optim.AdamW(trained, lr=0.01))
    x = lite.to_device(torch.randn(256, 64))
    for _ in range(50):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x)
        lite.backward(loss)
        optimizer.step()
    lite.print(f"loss {float(loss):.4f}, {sum(p.numel() for p in trained)} numbers trained")
