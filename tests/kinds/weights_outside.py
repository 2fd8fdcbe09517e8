"""Weights that are written or read outside of a forward: both act."""
# variants: load init write penalty
# plan: 0=colwise 2=rowwise

import sys

import torch
from torch import nn

from plugframe import Lite

KIND = sys.argv[1]


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def change(model):
    if KIND == "load":
        model.load_state_dict(make(3).state_dict())
    if KIND == "init":
        torch.manual_seed(4)
        nn.init.xavier_uniform_(model[0].weight)
    if KIND == "write":
        with torch.no_grad():
            model[0].weight.copy_(torch.full((6, 4), 0.2))
            model[2].bias.data.clamp_(-0.01, 0.01)


lite = Lite()
lite.launch()
shard, shards = lite.strategy.strategy_data_shard()  # of the samples
model, plain = make(), make()
optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
model, optimizer = lite.setup(model, optimizer)
x = torch.randn(lite.world_size, 6, 4, generator=torch.Generator().manual_seed(1))
for _ in range(2):
    for each, own, backward, batch in (
        (model, optimizer, lite.backward, x[shard::shards]),
        (plain, other, torch.Tensor.backward, x.flatten(0, 1)),
    ):
        change(each)
        own.zero_grad()
        loss = each(batch).pow(2).mean()
        if KIND == "penalty":
            loss = loss + 0.1 * sum(p.pow(2).sum() for p in each.parameters())
        backward(loss)
        own.step()
got = lite.state_dict(model, all_ranks=True)
off = max(float((got[name] - value).abs().max()) for name, value in plain.state_dict().items())
print(f"right {KIND}" if off < 1e-5 else f"WRONG {KIND}: weights off by {off:.4f}")
sys.exit(off >= 1e-5)
