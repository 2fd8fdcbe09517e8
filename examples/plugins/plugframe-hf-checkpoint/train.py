"""Train a small model and save it: plugframe run train.py --checkpoint=hf"""

from types import SimpleNamespace

import torch
from torch import nn

from plugframe import Lite


class Net(nn.Module):
    """A model with a configuration and tied weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(to_dict=lambda: {"model_type": "net", "width": width})
        self.encode, self.decode = nn.Linear(8, width), nn.Linear(width, 8)
        self.again = nn.Linear(8, width, bias=False)
        self.again.weight = self.encode.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction of x, of shape (N, 8)."""
        return self.decode(self.encode(x).relu() + self.again(x))


with Lite() as lite:
    lite.seed_everything(0)
    model = Net(width=16)
    model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    x = lite.to_device(torch.randn(64, 8))
    num_steps = 50
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x)
        lite.backward(loss)
        optimizer.step()
    lite.print(f"loss {float(loss):.4f}")
    lite.save("runs/last", {"model": model, "optimizer": optimizer, "step": num_steps})
