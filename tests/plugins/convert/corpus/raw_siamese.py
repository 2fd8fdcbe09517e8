"""A triplet loss over three forwards of one network."""

# ranks: 2
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Triplets(Dataset):
    def __init__(self, n):
        self.x = torch.linspace(-1, 1, n * 3).view(n, 3)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.x[i] * 1.1, -self.x[(i + 3) % len(self.x)]


torch.manual_seed(0)
net = nn.Linear(3, 2)
optim = torch.optim.SGD(net.parameters(), lr=0.05)
criterion = nn.TripletMarginLoss(margin=1.0)
dl = DataLoader(Triplets(18), batch_size=6)
for epoch in range(2):
    for step, (anchor, positive, negative) in enumerate(dl):
        optim.zero_grad()
        loss = criterion(net(anchor), net(positive), net(negative))
        loss.backward()
        optim.step()
        if step % 2 == 0:
            print(epoch, step, "loss:", loss.item())
