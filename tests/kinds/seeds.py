"""Random numbers of ranks, workers and data sets"""

# variants: workers held loop split

import random
import sys

import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, random_split

from plugframe import Lite

variant = sys.argv[1]


class Crops(Dataset):
    """Samples that a generator of the data set's own changes."""

    def __init__(self):
        self.rng = numpy.random.default_rng(0)

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.tensor(self.rng.random(), dtype=torch.float64)


class Block(nn.Module):
    """Two layers, with the plan that tensor parallelism needs."""

    def __init__(self):
        super().__init__()
        self.tensor_parallel_plan = {"enter": "colwise", "leave": "rowwise"}
        self.enter, self.leave = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.leave(self.enter(x))


lite = Lite()
lite.seed_everything("7", per_rank=True)
model = Block()
model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
# Ranks of one tensor group read the same batches: then their numbers are equal, and else they are not.
probe = lite.setup_dataloaders(DataLoader(torch.arange(64), batch_size=1))
first = lite.all_gather(next(iter(probe))).flatten().tolist()
shares = len(set(first))

if variant in ("workers", "held"):
    loader = lite.setup_dataloaders(DataLoader(Crops(), batch_size=2, num_workers=2 * (variant == "workers")))
    mine = torch.cat([batch for _ in range(2) for batch in loader])
elif variant == "loop":
    mine = torch.tensor([random.random(), numpy.random.rand(), torch.rand(()).item()], dtype=torch.float64)
else:
    mine = torch.tensor([float(index) for index in random_split(range(99), [50, 49])[0].indices])
    shares = 1
rows = {tuple(row) for row in lite.all_gather(mine).tolist()}
flat = [value for row in rows for value in row]
if len(rows) != shares or (len(set(flat)) != len(flat)):
    print(f"WRONG {variant}: {len(rows)} different rows of numbers, expected {shares}; {len(set(flat))} of {len(flat)}")
    sys.exit(1)
print("right", variant)
