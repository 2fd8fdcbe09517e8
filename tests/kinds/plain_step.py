"""A plain step: forward, backward, step."""
# plan: 0=colwise 2=rowwise

import sys

import torch
from torch import nn

from plugframe import Lite


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


model, alone = make(), make()
lite = Lite()
lite.launch()
shard, shards = lite.strategy.strategy_data_shard()  # of the samples
model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
reference = torch.optim.SGD(alone.parameters(), lr=0.1)
data = torch.randn(lite.world_size, 3, 4, generator=torch.Generator().manual_seed(1))
for _ in range(3):
    optimizer.zero_grad()
    loss = model(data[shard::shards]).pow(2).mean()
    lite.backward(loss)
    optimizer.step()
    reference.zero_grad()
    alone(data.flatten(0, 1)).pow(2).mean().backward()
    reference.step()
# The loss depends on all weights: it is the same on all ranks and in one process.
with torch.no_grad():
    loss, expected = model(data.flatten(0, 1)).pow(2).mean(), alone(data.flatten(0, 1)).pow(2).mean()
if not torch.allclose(loss, expected, rtol=1e-4):
    print(f"WRONG: loss {loss.item():.6f}, in one process {expected.item():.6f}")
    sys.exit(1)
print("right")
