"""An optimizer of the script's own, and parameters in groups by name."""

# ranks: 2
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset


@dataclass
class Config:
    lr: float = 0.05
    batch_size: int = 6
    epochs: int = 2


class SignSGD(Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])


def make_optimizer(model, cfg):
    decay, rest = [], []
    for name, p in model.named_parameters():
        (decay if name.endswith("weight") else rest).append(p)
    return SignSGD([{"params": decay}, {"params": rest, "lr": cfg.lr / 2}], lr=cfg.lr)


def run(cfg: Config) -> None:
    torch.manual_seed(0)
    x = torch.randn(24, 3)
    loader: DataLoader = DataLoader(TensorDataset(x, x.mean(1)), batch_size=cfg.batch_size)
    model: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 1))
    optimizer: Optimizer = make_optimizer(model, cfg)
    for epoch in range(cfg.epochs):
        epoch_loss: float = 0
        n = 0
        for features, target in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(features).squeeze(1), target)
            loss.backward()
            optimizer.step()
            epoch_loss += float(loss) * len(features)
            n += len(features)
        print(f"{epoch=} loss={epoch_loss / n:.6f}")


if __name__ == "__main__":
    run(Config())
