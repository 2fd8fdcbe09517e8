"""An optimizer that does not treat every element of every parameter by itself"""
# variants: norm factored slow list lbfgs
# plan: 0=colwise 2=rowwise

import functools
import sys

import torch
from torch import nn

from plugframe import Lite


class ByNorm(torch.optim.Optimizer):
    """Scales by the norm of each parameter, as LARS does."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] * float(p.norm() / p.grad.norm()))


class OwnList(torch.optim.Optimizer):
    """Steps through a list of its own."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.mine = list(self.param_groups[0]["params"])

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.mine:
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.1)


class Slow(OwnList):
    """Keeps slow copies of the weights, by parameter."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            slow = self.state[p].setdefault("slow", p.detach().clone())
            p.copy_(slow.lerp_(p, 0.5))


kind = sys.argv[1]
kinds = {"norm": ByNorm, "factored": torch.optim.Adafactor, "slow": Slow, "list": OwnList}
make = kinds.get(kind, lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
plain.load_state_dict(model.state_dict())
lite = Lite()
lite.launch()
shard, shards = lite.strategy.strategy_data_shard()  # of the samples
model, optimizer = lite.setup(model, make(model.parameters()))
other = make(plain.parameters())
x = torch.randn(4 * lite.world_size, 4, generator=torch.Generator().manual_seed(3))


def closure(net, opt, x, backward):
    opt.zero_grad()
    loss = net(x).square().mean()
    backward(loss)
    return loss


for _ in range(3):
    for net, opt, part, backward in (
        (model, optimizer, x[shard::shards], lite.backward),
        (plain, other, x, torch.Tensor.backward),
    ):
        run = functools.partial(closure, net, opt, part, backward)
        opt.step(run) if kind == "lbfgs" else (run(), opt.step())
lite.save("runs/not_elementwise", {"model": model})
saved = lite.load("runs/not_elementwise")["model"]
off = max(float((saved[key] - value).abs().max()) for key, value in plain.state_dict().items())
print(f"right {kind}" if off < 1e-4 else f"WRONG {kind}: weights are off by {off:.5f}")
sys.exit(off >= 1e-4)
