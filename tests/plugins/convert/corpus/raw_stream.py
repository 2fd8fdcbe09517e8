"""An iterable data set, and a loop that ends after some steps."""

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


class Stream(IterableDataset):
    def __iter__(self):
        for i in range(1000):
            x = torch.tensor([i % 7, i % 5, i % 3], dtype=torch.float32) / 7
            yield x, x.sum().view(1)


def main():
    torch.manual_seed(0)
    loader = DataLoader(Stream(), batch_size=4)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, (x, y) in enumerate(loader):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item():.6f}")
        if step == 4:
            break


if __name__ == "__main__":
    main()
