"""Train a small model in two stages.

plugframe run train.py --devices=2 --accelerator=cpu --strategy=pipeline --strategy.micro-batches=8 \
    --strategy.schedule=plugframe_pipeline_zb:ZeroBubbleH1
"""

import torch
from torch import Tensor, nn

from plugframe import Lite


class Net(nn.Module):
    """A model that returns its loss, so that a schedule can run backwards between forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.layers(x), y)


with Lite() as lite:
    lite.seed_everything(0)
    model = Net()
    model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    x = lite.to_device(torch.randn(64, 16))
    for _ in range(50):
        optimizer.zero_grad()
        loss = model(x, x.sin())
        lite.backward(loss)
        optimizer.step()
    lite.print(f"loss {loss.item():.4f}")
