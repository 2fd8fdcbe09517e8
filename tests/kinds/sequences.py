"""Attention over sequences, with a loss over all of their tokens"""

# strategies: single fsdp context
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from plugframe import Lite


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x, mask):
        q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return x + torch.tanh(self.out(y.transpose(1, 2).flatten(2)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(7, 8), nn.Parameter(torch.randn(6, 8))
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 7)

    def forward(self, tokens):
        x = self.words(tokens) + self.places
        mask = (tokens != 0)[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def loss_of(model, tokens):
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


lite = Lite()
lite.launch()
model, plain = Model(), Model()
optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.3) for m in (model, plain))
model, optimizer = lite.setup(model, optimizer)
data = torch.randint(7, (8, 6), generator=torch.Generator().manual_seed(1))
data[:, 0] = 1  # a token that is not masked
loader = lite.setup_dataloaders(DataLoader(data, batch_size=4))
for _ in range(2):
    optimizer.zero_grad()
    for batch in loader:  # one on two ranks with different samples, two where they are the same
        lite.backward(loss_of(model, batch) / len(loader))
    lite.clip_gradients(model, optimizer, max_norm=0.5)
    optimizer.step()
    other.zero_grad()
    loss_of(plain, data).backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    other.step()
got = lite.state_dict(model, all_ranks=True)
off = max(float((got[name] - value).abs().max()) for name, value in plain.state_dict().items())
print("right" if off < 1e-5 else f"WRONG: weights off by {off:.4f}")
sys.exit(off >= 1e-5)
