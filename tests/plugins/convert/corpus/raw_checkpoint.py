"""A checkpoint of model, optimizer, scheduler and epoch, and a run that goes on from it."""

# ranks: 2
import os
import tempfile

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CHECKPOINT = os.path.join(tempfile.gettempdir(), "checkpoint.pt")


def build():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    return model, optimizer, scheduler


def run(start, end):
    torch.manual_seed(start)
    x = torch.linspace(-1, 1, 64).view(16, 4)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=4)
    model, optimizer, scheduler = build()
    if start:
        checkpoint = torch.load(CHECKPOINT, map_location="cpu")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        assert checkpoint["epoch"] == start
    for epoch in range(start, end):
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = nn.CrossEntropyLoss()(model(inputs), labels)
            loss.backward()
            optimizer.step()
        scheduler.step()
        print(f"{epoch} {loss.item():.5f} {scheduler.get_last_lr()[0]:.5f}")
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "epoch": end,
        },
        CHECKPOINT,
    )


run(0, 2)
run(2, 4)
