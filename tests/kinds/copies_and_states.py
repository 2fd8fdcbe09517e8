"""Copies of a model are plain and follow it; a state that torch.save writes by hand can be loaded, or is refused."""
# variants: average copy state pickle
# plan: 0=colwise_gather

import copy
import io
import sys

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from plugframe import Lite

KIND = sys.argv[1]


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))


lite = Lite()
model, plain = make(), make()
optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
model, optimizer = lite.setup(model, optimizer)
x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def average_of(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)) if KIND == "average" else copy.deepcopy(model)


means = [average_of(model), average_of(plain)]
for _ in range(3):
    for each, own, mean, backward in (
        (model, optimizer, means[0], lite.backward),
        (plain, other, means[1], torch.Tensor.backward),
    ):
        own.zero_grad()
        backward(each(x).pow(2).mean())
        own.step()
        if KIND == "average":
            mean.update_parameters(each)
        else:
            with torch.no_grad():
                for a, b in zip(mean.parameters(), each.parameters(), strict=True):
                    a.lerp_(b.detach(), 0.5)
pairs = [(p.detach(), q.detach()) for p, q in zip(*(m.parameters() for m in means), strict=True)]
if KIND in ("state", "pickle"):
    buffer = io.BytesIO()
    if lite.is_global_zero:
        torch.save(model.state_dict() if KIND == "state" else model, buffer)
        buffer.seek(0)
        found = torch.load(buffer, weights_only=KIND == "state")
        found = found if KIND == "state" else found.state_dict()
        pairs = [(found[name], value) for name, value in plain.state_dict().items()]
off = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
print(f"right {KIND}" if off < 1e-5 else f"WRONG {KIND}: off by {off:.4f}")
sys.exit(off >= 1e-5)
