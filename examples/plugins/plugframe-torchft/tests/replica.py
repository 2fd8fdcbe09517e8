"""A replica that trains until the test says at which step to end: replica.py FOLDER LIGHTHOUSE REPLICA"""

import sys
from pathlib import Path

import torch
from plugframe_torchft.strategy import TorchFT
from torch import nn

from plugframe import Lite

folder, lighthouse, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
strategy = TorchFT(replica=number, num_replicas=2, lighthouse=lighthouse, timeout_s=20)
with Lite(accelerator="cpu", devices=1, strategy=strategy) as lite:
    torch.manual_seed(number)
    model = nn.Linear(4, 2)
    model, optimizer = lite.setup(model, torch.optim.Adam(model.parameters(), lr=0.01))
    attempts = 0
    while True:
        optimizer.zero_grad()
        lite.backward(model(torch.full((1, 4), 1.0 + number)).square().mean())
        optimizer.step()
        attempts += 1
        step, end = strategy.manager.current_step(), folder / "end"
        count = f"{step} {strategy.manager.num_participants()} {attempts}"
        (folder / f"{number}.new").write_text(count)
        (folder / f"{number}.new").rename(folder / f"{number}.step")
        if end.exists() and step >= int(end.read_text()):
            break
    torch.save([parameter.detach() for parameter in model.parameters()], folder / f"{number}.weights")
