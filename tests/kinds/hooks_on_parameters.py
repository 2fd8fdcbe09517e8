"""Hooks on parameters act on the gradients of the whole batch, registered before set-up or after it."""
# variants: before after post
# plan: 0=colwise 1=rowwise

import sys

import torch
from torch import nn

from plugframe import Lite

KIND = sys.argv[1]


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1))


def halve(parameter):
    parameter.grad.mul_(0.5)


def add(model):
    if KIND == "post":
        model[0].weight.register_post_accumulate_grad_hook(halve)
    else:
        model[0].weight.register_hook(lambda gradient: gradient / gradient.norm())
    model[1].bias.no_decay = True


lite = Lite()
lite.launch()
shard, shards = lite.strategy.strategy_data_shard()  # of the samples
model, plain = make(), make()
add(plain)
if KIND != "after":
    add(model)
optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
model, optimizer = lite.setup(model, optimizer)
if KIND == "after":
    add(model)
x = torch.randn(lite.world_size, 6, 4, generator=torch.Generator().manual_seed(1))
for _ in range(3):
    optimizer.zero_grad()
    lite.backward(model(x[shard::shards]).pow(2).mean())
    optimizer.step()
    other.zero_grad()
    plain(x).pow(2).mean().backward()
    other.step()
got = lite.state_dict(model, all_ranks=True)
off = max(float((got[name] - value).abs().max()) for name, value in plain.state_dict().items())
kept = getattr(model[1].bias, "no_decay", False)
right = off < 1e-5 and kept
print(f"right {KIND}" if right else f"WRONG {KIND}: weights off by {off:.4f}, attribute kept: {kept}")
sys.exit(not right)
