"""An optimizer whose line search evaluates a closure several times"""
# variants: wolfe plain float
# strategies: single ddp fsdp tensor_parallel deepspeed_stage_1 deepspeed_stage_2 deepspeed_stage_3
# plan: 0=colwise 2=rowwise

import sys

import torch
from torch import nn

from plugframe import Lite

KIND = sys.argv[1]


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))


def optimizer_of(model):
    search = None if KIND == "plain" else "strong_wolfe"
    return torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=6, line_search_fn=search)


def closure_of(model, optimizer, x, backward):
    def closure():
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True).cos()).square().mean()
        backward(loss)
        return loss.item() if KIND == "float" else loss

    return closure


lite = Lite()
lite.launch()
shard, shards = lite.strategy.strategy_data_shard()  # of the samples
model, plain = make(), make()
optimizer, other = optimizer_of(model), optimizer_of(plain)
model, optimizer = lite.setup(model, optimizer)
x = torch.randn(8 * lite.world_size, 3, generator=torch.Generator().manual_seed(2))
for _ in range(2):
    optimizer.step(closure_of(model, optimizer, x[shard::shards], lite.backward))
    other.step(closure_of(plain, other, x, torch.autograd.backward))
for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
    value = mine.full_tensor() if hasattr(mine, "full_tensor") else mine
    if not torch.allclose(value, theirs, atol=1e-3):
        print(f"WRONG {KIND}: {name} is off by {(value - theirs).abs().max():.4f}")
        sys.exit(1)
print("right", KIND)
