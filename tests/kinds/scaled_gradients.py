"""Gradients that a script clips, logs, accumulates or applies itself under a loss scaler"""
# variants: clip twice log accumulate manual stranger
# strategies: single ddp fsdp tensor_parallel deepspeed_stage_1 deepspeed_stage_2 deepspeed_stage_3
# precision: 16-mixed
# plan: 0=colwise 2=rowwise

import sys

import torch
from torch import nn

from plugframe import Lite

KIND = sys.argv[1]


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def train(model, optimizer, x, backward, clip) -> list[float]:
    norms = []
    for _ in range(4):
        model.zero_grad()
        for _ in range(2 if KIND == "accumulate" else 1):
            backward(1e-3 * (model(x) - x.sum(1, keepdim=True)).square().mean())
        if KIND == "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        if KIND == "twice":
            clip(1e-2), clip(1e-3)
        if KIND == "log":
            norms.append(float(sum(full(p.grad).norm() for p in model.parameters())))
        if KIND == "manual":
            with torch.no_grad():
                for p in model.parameters():
                    p -= 10 * p.grad
        else:
            optimizer.step()
    return norms


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().float()


lite = Lite()
lite.launch()
shard, shards = lite.strategy.strategy_data_shard()  # of the samples
model, plain = make(), make()
optimizer, other = (torch.optim.SGD(each.parameters(), lr=10.0) for each in (model, plain))
if KIND in ("manual", "stranger"):
    model = lite.setup_module(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
else:
    model, optimizer = lite.setup(model, optimizer)
x = torch.randn(8 * lite.world_size, 4, generator=torch.Generator().manual_seed(2))
mine = x[shard::shards]
got = train(model, optimizer, mine, lite.backward, lambda limit: lite.clip_gradients(model, optimizer, max_norm=limit))
want = train(
    plain, other, x, torch.autograd.backward, lambda limit: nn.utils.clip_grad_norm_(plain.parameters(), limit)
)
pairs = list(zip(map(full, model.parameters()), plain.parameters(), strict=True))
pairs += zip(map(torch.tensor, got), map(torch.tensor, want), strict=True)
for a, b in pairs:
    if not torch.allclose(a, b, rtol=0.05, atol=2e-3):
        print(f"WRONG {KIND}: off by {(a - b).abs().max():.4f}")
        sys.exit(1)
print("right", KIND)
