"""A trainable layer or parameter that comes after set-up is averaged, or named at the next forward."""
# variants: head inner parameter
# plan: 0=colwise 2=rowwise

import sys

import torch
from torch import nn

from plugframe import Lite

KIND = sys.argv[1]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
lite = Lite()
lite.launch()
shard, shards = lite.strategy.strategy_data_shard()  # of the samples
model = lite.setup_module(model)
torch.manual_seed(1)
if KIND == "head":
    model[2] = nn.Linear(4, 1)
elif KIND == "inner":
    model[0] = nn.Sequential(model[0], nn.Linear(4, 4))
else:
    model[2].gain = nn.Parameter(torch.ones(1))
    model[2].register_forward_hook(lambda module, args, out: out * module.gain)
optimizer = lite.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
x = torch.randn(lite.world_size, 6, 4, generator=torch.Generator().manual_seed(1))
for _ in range(2):
    optimizer.zero_grad()
    lite.backward(model(x[shard::shards]).pow(2).mean())
    optimizer.step()
everywhere = lite.all_gather({name: p.detach() for name, p in model.named_parameters()})
apart = [name for name, values in everywhere.items() if not all(torch.equal(values[0], v) for v in values)]
print(f"WRONG {KIND}: {apart} differ between ranks" if apart else f"right {KIND}")
sys.exit(bool(apart))
