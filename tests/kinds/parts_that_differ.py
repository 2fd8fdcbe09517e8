"""Ranks that run different parts of a model: the numbers of one process, or the part is named in the same step."""
# variants: experts depth same
# strategies: ddp fsdp deepspeed_stage_3

import sys

import torch
from torch import nn

from plugframe import Lite

KIND = sys.argv[1]


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x).relu()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(3))
        self.out = nn.Linear(4, 1)

    def forward(self, x, chosen):
        for number in chosen:
            x = self.experts[number](x)
        return self.out(x)


def choice(rank, step):
    if KIND == "experts":
        return [(rank + step) % 3]
    if KIND == "depth":
        return list(range(3 - rank % 2))
    return [step % 3]


torch.manual_seed(0)
model = Net()
plain = Net()
plain.load_state_dict(model.state_dict())
lite = Lite()
optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
model, optimizer = lite.setup(model, optimizer)
x = torch.randn(lite.world_size, 6, 4, generator=torch.Generator().manual_seed(1))
for step in range(4):
    optimizer.zero_grad()
    lite.backward(model(x[lite.global_rank], choice(lite.global_rank, step)).pow(2).mean())
    optimizer.step()
    other.zero_grad()
    losses = [plain(x[rank], choice(rank, step)).pow(2).mean() for rank in range(lite.world_size)]
    (sum(losses) / len(losses)).backward()
    other.step()
got = lite.state_dict(model, all_ranks=True)
off = max(float((got[name] - value).abs().max()) for name, value in plain.state_dict().items())
print(f"right {KIND}" if off < 1e-4 else f"WRONG {KIND}: weights off by {off:.4f}")
sys.exit(off >= 1e-4)
