"""Experts that get the tokens of their choice, and parameters of experts that the script reads and changes"""

# variants: loop skipping stacked by_hand
# strategies: single fsdp expert
import sys

import torch
from torch import nn

from plugframe import Lite

KIND = sys.argv[1]


class Expert(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x, counts):
        parts = zip(torch.split(x, counts.tolist()), self.up, self.down, strict=True)
        return torch.cat([torch.tanh(part @ up) @ down for part, up, down in parts])


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = Stacked() if KIND == "stacked" else nn.ModuleList([Expert() for _ in range(3)])

    def forward(self, x):
        weight, chosen = self.router(x).softmax(-1).max(-1)
        if KIND == "stacked":
            order = chosen.argsort(stable=True)
            found = self.experts(x[order], chosen.bincount(minlength=3))
            return x + torch.zeros_like(x).index_add(0, order, found * weight[order, None])
        out = x.clone()
        for number, expert in enumerate(self.experts):
            (token,) = (chosen == number).nonzero(as_tuple=True)
            if len(token) or KIND != "skipping":
                out.index_add_(0, token, expert(x[token]) * weight[token, None])
        return out


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.expert_plan = {"mixture.experts": "grouped" if KIND == "stacked" else "modules"}
        torch.manual_seed(0)
        self.mixture, self.head = Mixture(), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.mixture(x))


def change(model, step):
    first, second, _ = model.mixture.experts
    if not step:
        first[0].weight.register_hook(lambda gradient: gradient * 0.5)
        second[0].bias.requires_grad_(False)
    if step == 2:
        second[0].bias.requires_grad_(True)
        with torch.no_grad():
            first[2].weight.clamp_(-0.1, 0.1)
            second.load_state_dict({name: value * 0 + 0.2 for name, value in Expert().state_dict().items()})


lite = Lite()
lite.launch()
shard, shards = lite.strategy.strategy_data_shard()  # of the samples
model, plain = Model(), Model()
optimizer, other = (torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, plain))
model, optimizer = lite.setup(model, optimizer)
x = torch.randn(lite.world_size, 6, 4, generator=torch.Generator().manual_seed(1))
for step in range(4):
    for each, own, backward, batch in (
        (model, optimizer, lite.backward, x[shard::shards].flatten(0, 1)),
        (plain, other, torch.Tensor.backward, x.flatten(0, 1)),
    ):
        own.zero_grad()
        if KIND == "by_hand":
            change(each, step)
        loss = each(batch).pow(2).mean()
        if KIND == "by_hand":
            loss = loss + 0.1 * sum(p.pow(2).sum() for p in each.parameters() if p.requires_grad)
        backward(loss)
        own.step()
got = lite.state_dict(model, all_ranks=True)
off = max(float((got[name] - value).abs().max()) for name, value in plain.state_dict().items())
print(f"right {KIND}" if off < 1e-5 else f"WRONG {KIND}: weights off by {off:.4f}")
sys.exit(off >= 1e-5)
