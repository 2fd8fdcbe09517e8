"""Gradient penalties, double backward and terms over parameters outside of forward"""
# variants: penalty graph outside inside
# plan: layers.0=colwise layers.2=rowwise

import sys

import torch
from torch import nn

from plugframe import Lite

KIND = sys.argv[1]


class Energy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        if KIND != "inside":
            return self.layers(x)
        x = x.requires_grad_()
        energy = self.layers(x)
        return energy + torch.autograd.grad(energy.sum(), x, create_graph=True)[0].sum(1, keepdim=True)


def loss_of(model, x):
    if KIND == "penalty":
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean()
    if KIND == "outside":
        return model(x).mean() + sum(p.square().sum() for p in model.parameters())
    return model(x).square().mean()


torch.manual_seed(0)
model, plain = Energy(), Energy()
plain.load_state_dict(model.state_dict())
lite = Lite()
lite.launch()
shard, shards = lite.strategy.strategy_data_shard()  # of the samples
model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
other = torch.optim.SGD(plain.parameters(), lr=0.1)
x = torch.randn(4 * lite.world_size, 3, generator=torch.Generator().manual_seed(1))
options = {"create_graph": True} if KIND == "graph" else {}
for _ in range(2):
    optimizer.zero_grad()
    other.zero_grad()
    lite.backward(loss_of(model, x[shard::shards].clone()), **options)
    loss_of(plain, x.clone()).backward()
    optimizer.step()
    other.step()
lite.save("runs/weights", {"model": model})
saved = lite.load("runs/weights")["model"]
for name, value in plain.state_dict().items():
    if not torch.allclose(saved[name], value, atol=1e-5):
        print(f"WRONG {KIND}: {name} is off by {(saved[name] - value).abs().max():.5f}")
        sys.exit(1)
print("right", KIND)
