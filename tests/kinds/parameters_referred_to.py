"""Optimizers, lists and dicts that hold parameters of before set-up train those of after it."""
# variants: own lbfgs list
# plan: 0=colwise 2=rowwise

import sys

import torch
from torch import nn

from plugframe import Lite

KIND = sys.argv[1]


class Own(torch.optim.Optimizer):
    """Momentum in a dict by parameter, and a list of its own."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.everything = [p for group in self.param_groups for p in group["params"]]
        self.sums = {p: torch.zeros_like(p) for p in self.everything}

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.everything:
            self.sums[p].mul_(0.9).add_(p.grad)
            p.sub_(self.sums[p], alpha=0.1)


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    makers = {"own": Own, "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)}
    return model, makers.get(KIND, lambda p: torch.optim.SGD(p, lr=0.1))(model.parameters()), list(model.parameters())


lite = Lite()
lite.launch()
shard, shards = lite.strategy.strategy_data_shard()  # of the samples
model, optimizer, held = make()
plain, other, plain_held = make()
model, optimizer = lite.setup(model, optimizer)
x = torch.randn(lite.world_size, 6, 4, generator=torch.Generator().manual_seed(1))


def step(model, optimizer, backward, batch, parameters):
    def closure():
        optimizer.zero_grad()
        loss = model(batch).pow(2).mean()
        backward(loss)
        if KIND == "list":
            nn.utils.clip_grad_norm_(parameters, 0.1)
        return loss

    if KIND == "lbfgs":
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


for _ in range(3):
    step(model, optimizer, lite.backward, x[shard::shards], held)
    step(plain, other, torch.Tensor.backward, x.flatten(0, 1), plain_held)
got = lite.state_dict(model, all_ranks=True)
off = max(float((got[name] - value).abs().max()) for name, value in plain.state_dict().items())
print(f"right {KIND}" if off < 1e-4 else f"WRONG {KIND}: weights off by {off:.4f}")
sys.exit(off >= 1e-4)
