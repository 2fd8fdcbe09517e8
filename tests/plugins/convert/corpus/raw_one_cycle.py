"""A schedule that steps after every batch, and warms up; the history is a list."""

# ranks: 2
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def get_lr(optimizer):
    for param_group in optimizer.param_groups:
        return param_group["lr"]


def fit_one_cycle(epochs, max_lr, model, train_loader):
    history = []
    optimizer = torch.optim.SGD(model.parameters(), lr=max_lr, momentum=0.9)
    sched = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, epochs=epochs, steps_per_epoch=len(train_loader))
    for epoch in range(epochs):
        model.train()
        train_losses = []
        lrs = []
        for xb, yb in train_loader:
            loss = nn.functional.cross_entropy(model(xb), yb)
            train_losses.append(loss.item())
            loss.backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            lrs.append(get_lr(optimizer))
            sched.step()
        result = {"train_loss": sum(train_losses) / len(train_losses), "lrs": lrs}
        print("Epoch [{}], last_lr: {:.5f}, train_loss: {:.6f}".format(epoch, lrs[-1], result["train_loss"]))
        history.append(result)
    return history


torch.manual_seed(0)
x = torch.randn(24, 4)
loader = DataLoader(TensorDataset(x, (x[:, 0] > x[:, 1]).long()), batch_size=8)
fit_one_cycle(2, 0.1, nn.Linear(4, 2), loader)
