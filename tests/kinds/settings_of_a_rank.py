"""A learning rate, a momentum or a number of steps that differs between ranks"""
# variants: plateau momentum equal

import sys

import torch

from plugframe import Lite

KIND = sys.argv[1]
lite = Lite()
torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5))
plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
for number in range(6):
    optimizer.zero_grad()
    loss = (model(torch.ones(2, 4)) - lite.global_rank).square().mean()
    lite.backward(loss)
    if KIND != "skipped" or number != 2 or lite.global_rank == 0:
        optimizer.step()
    if KIND == "plateau":
        plateau.step(1.0 if lite.global_rank else 1.0 / (number + 1))  # each rank's own
    if KIND == "momentum" and lite.global_rank:
        optimizer.param_groups[0]["momentum"] = 0.9
if lite.world_size > 1 and KIND != "equal":
    print(f"WRONG {KIND}: the ranks went apart, and nothing said so")
    sys.exit(1)
print("right", KIND)
