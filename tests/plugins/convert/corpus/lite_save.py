"""Early Lite that saves and loads in torch's order, and passes arguments of its own."""

import os
import tempfile

import torch
from lightning_lite import LightningLite
from torch import nn


class Trainer(LightningLite):
    def __init__(self, lr: float, **settings):
        super().__init__(**settings)
        self.lr = lr

    def run(self, steps: int) -> None:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.pt")
            model = nn.Linear(3, 1)
            model, optimizer = self.setup(model, torch.optim.Adam(model.parameters(), lr=self.lr))
            x = self.to_device(torch.arange(12.0).view(4, 3) / 10)
            for step in range(steps):
                optimizer.zero_grad()
                loss = (model(x) - 1).square().mean()
                self.backward(loss)
                optimizer.step()
                self.print(step, f"{loss.item():.6f}")
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": steps}
            self.barrier()
            self.save(content, path)
            loaded = self.load(path)
            model.load_state_dict(loaded["model"])
            self.print("loaded", loaded["step"], f"{(model(x) - 1).square().mean().item():.6f}")


Trainer(lr=0.1, accelerator="cpu", devices=1, precision=32).run(3)
