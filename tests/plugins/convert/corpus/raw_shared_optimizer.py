"""One optimizer over two models, chained and in groups."""

# ranks: 2
import itertools

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def train():
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    loader = DataLoader(TensorDataset(x), batch_size=8)
    encoder = nn.Linear(4, 2)
    decoder = nn.Linear(2, 4)
    head = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(itertools.chain(encoder.parameters(), decoder.parameters()), lr=0.05)
    head_optimizer = torch.optim.SGD([{"params": head.weight, "lr": 0.1}, {"params": [head.bias], "lr": 0.01}])
    for epoch in range(3):
        for (batch,) in loader:
            optimizer.zero_grad()
            head_optimizer.zero_grad()
            code = encoder(batch)
            loss = nn.functional.mse_loss(decoder(code), batch)
            loss.backward()
            optimizer.step()
        print(epoch, f"{loss.item():.6f}")
    return head


train()
