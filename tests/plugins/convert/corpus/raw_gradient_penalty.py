"""A critic with a gradient penalty: gradients of gradients."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
real = torch.randn(16, 2) + 1
loader = DataLoader(TensorDataset(real), batch_size=8)
critic = nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 1))
optimizer = torch.optim.Adam(critic.parameters(), lr=0.02)


def gradient_penalty(x):
    x = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return ((grad.norm(2, dim=1) - 1) ** 2).mean()


for epoch in range(2):
    for (x,) in loader:
        fake = torch.randn_like(x)
        loss = critic(fake).mean() - critic(x).mean() + gradient_penalty(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"{loss.item():.5f}")
