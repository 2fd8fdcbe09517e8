"""Train a small model in actors of Ray: python train.py"""

import torch
from torch import nn

from plugframe import Lite


def train(lite: Lite) -> float:
    """Train on this rank, and return the last loss."""
    lite.seed_everything(0)
    model = nn.Linear(8, 1)
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = lite.to_device(torch.randn(64, 8))
    for _ in range(50):
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        lite.backward(loss)
        optimizer.step()
    return float(loss)


if __name__ == "__main__":
    lite = Lite(accelerator="cpu", devices=2, strategy="ddp", launcher="ray")
    print(f"loss {lite.launch(train):.4f}")
