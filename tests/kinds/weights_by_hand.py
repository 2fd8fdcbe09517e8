"""Weights changed by the script after set-up hold in the next step"""
# variants: load init clamp assign vector
# strategies: single ddp fsdp tensor_parallel deepspeed_stage_1 deepspeed_stage_2 deepspeed_stage_3
# plan: 0=colwise 2=rowwise

import sys

import torch
from torch import nn

from plugframe import Lite


def make() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


@torch.no_grad()
def change(model: nn.Module, kind: str) -> None:
    if kind == "load":
        model.load_state_dict({key: torch.full_like(value, 0.2) for key, value in start.items()})
    elif kind == "init":
        nn.init.ones_(model[2].weight)
    elif kind == "clamp":
        for parameter in model.parameters():
            parameter.data.clamp_(min=0.0)
    elif kind == "assign":
        model[0].bias.data = model[0].bias.data + 1
    else:
        nn.utils.vector_to_parameters(torch.linspace(-1, 1, 56), model.parameters())


kind = sys.argv[1]
model, plain = make(), make()
start = plain.state_dict()
lite = Lite()
lite.launch()
shard, shards = lite.strategy.strategy_data_shard()  # of the samples
model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
other = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
x = torch.randn(4 * lite.world_size, 6, generator=torch.Generator().manual_seed(3))
for step in range(3):
    if step == 1:
        change(model, kind)
        change(plain, kind)
    optimizer.zero_grad()
    lite.backward(model(x[shard::shards]).square().mean())
    optimizer.step()
    other.zero_grad()
    plain(x).square().mean().backward()
    other.step()
lite.save("runs/weights_by_hand", {"model": model})
saved = lite.load("runs/weights_by_hand")["model"]
off = max(float((saved[key] - value).abs().max()) for key, value in plain.state_dict().items())
print(f"right {kind}" if off < 1e-5 else f"WRONG {kind}: weights are off by {off:.5f}")
sys.exit(off >= 1e-5)
