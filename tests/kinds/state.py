"""A checkpoint depends neither on wrappers around parts of a model, nor on which of two tied names it has."""

# variants: module compiled inside tied tensor_lr
# strategies: single ddp fsdp deepspeed

from __future__ import annotations

import os
import sys
import tempfile

import torch
from torch import nn

from plugframe import Lite

kind = sys.argv[1]


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        if kind == "tied":
            self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


lite = Lite()
source, model = Net(1), Net(2)
rate = torch.tensor(0.5) if kind == "tensor_lr" else 0.5
model, optimizer = lite.setup(model, torch.optim.Adam(model.parameters(), lr=rate, foreach=False))
folder = lite.broadcast(tempfile.mkdtemp())
rename = {
    "module": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "inside": lambda key: key.replace("last.", "last._orig_mod.module."),
}.get(kind, str)
state = {rename(key): value for key, value in source.state_dict().items()}
if kind == "tied":
    del state["last.weight"]
if lite.is_global_zero:
    torch.save(state, os.path.join(folder, "x"))
lite.barrier()
lite.load_raw(os.path.join(folder, "x"), model)

losses = []
plain = torch.optim.Adam(source.parameters(), lr=0.5)
for _ in range(2):
    for net, opt, back in ((model, optimizer, lite.backward), (source, plain, torch.Tensor.backward)):
        opt.zero_grad()
        loss = net(torch.ones(2, 4)).square().mean()
        back(loss)
        opt.step()
        losses.append(loss.item())
    lite.save(os.path.join(folder, "y"), {"model": model, "optimizer": optimizer})
    lite.load(os.path.join(folder, "y"), {"model": model, "optimizer": optimizer})
if torch.allclose(torch.tensor(losses[::2]), torch.tensor(losses[1::2]), rtol=1e-4):
    print("right", kind, losses)
else:
    print("WRONG", kind, losses)
    sys.exit(1)
