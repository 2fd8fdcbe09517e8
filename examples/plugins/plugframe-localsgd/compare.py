"""Compare communication and loss of local SGD and DDP: plugframe run compare.py --devices=2 --accelerator=cpu"""

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from plugframe import Lite, hookimpl
from plugframe.base import Extension


class Exchanges(Extension):
    """Count averages of parameters."""

    count = 0

    @hookimpl(wrapper=True)
    def collective_all_reduce(self) -> Any:
        self.count += 1
        return (yield)


def train(strategy: str) -> str:
    """Train for 1600 steps; return the number of exchanges between ranks and the validation loss, as a line."""
    exchanges = Exchanges()
    with Lite(strategy=strategy, plugins=[exchanges]) as lite:
        lite.seed_everything(0)
        x = torch.randn(2304, 8)
        y = (x[:, :4] * x[:, 4:]).sum(1, keepdim=True)
        model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.003))
        loader = lite.setup_dataloaders(DataLoader(TensorDataset(x[:2048], y[:2048]), batch_size=32, shuffle=True))
        steps = 0
        for _ in range(50):
            for inputs, targets in loader:
                optimizer.zero_grad()
                lite.backward(nn.functional.mse_loss(model(inputs), targets))
                optimizer.step()
                steps += 1
    with torch.no_grad():
        loss = float(nn.functional.mse_loss(model(x[2048:]), y[2048:]))
    # ddp averages gradients in every step, without this hook.
    return f"{strategy:10} {exchanges.count or steps:5} exchanges, loss {loss:.3f}" if lite.is_global_zero else ""


for name in ("ddp", "local_sgd", "diloco"):
    line = train(name)
    if line:
        print(line)
