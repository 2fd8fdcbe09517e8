"""Parameters frozen and unfrozen between a forward and its backward, as a GAN's discriminator"""
# variants: between part both
# strategies: single ddp fsdp tensor_parallel deepspeed_stage_1 deepspeed_stage_2 deepspeed_stage_3
# plan: 0=colwise 2=rowwise

import sys

import torch
from torch import nn

from plugframe import Lite

KIND = sys.argv[1]


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(), nn.Linear(8, 1))


def step(model, rows, backward) -> None:
    real = model(rows)
    frozen = model[0] if KIND == "part" else model
    frozen.requires_grad_(False)
    if KIND != "between":
        backward(model(rows.clone().requires_grad_()).mean())
    frozen.requires_grad_(True)
    backward(real.square().mean())


lite = Lite()
lite.launch()
shard, shards = lite.strategy.strategy_data_shard()  # of the samples
model, plain = lite.setup(make()), make()
rows = torch.randn(4 * lite.world_size, 4, generator=torch.Generator().manual_seed(1))
step(model, rows[shard::shards], lite.backward)
step(plain, rows, torch.autograd.backward)
for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
    if not torch.allclose(mine.grad, theirs.grad, atol=1e-6):
        print(f"WRONG {KIND}: the gradient of {name} is not that of one process")
        sys.exit(1)
print("right", KIND)
