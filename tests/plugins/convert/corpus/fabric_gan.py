"""Fabric with two models, and forward methods."""

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.seed import seed_everything
from torch import nn


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def forward(self, x):
        return self.net(x)

    def score(self, x):
        return self.net(x).mean()


fabric = Fabric(accelerator="cpu", devices=1)
seed_everything(0)
critic, generator = Critic(), nn.Linear(3, 2)
critic, critic_optimizer = fabric.setup(critic, torch.optim.Adam(critic.parameters(), lr=0.05))
critic.mark_forward_method("score")
generator, generator_optimizer = fabric.setup(generator, torch.optim.Adam(generator.parameters(), lr=0.05))
for step in range(4):
    noise = torch.ones(4, 3, device=fabric.device) * (step + 1) / 4
    real = torch.full((4, 2), 0.5, device=fabric.device)
    critic_loss = critic.score(generator(noise).detach()) - critic.score(real) + critic(real).square().mean()
    critic_optimizer.zero_grad()
    fabric.backward(critic_loss)
    critic_optimizer.step()
    generator_loss = -critic.score(generator(noise))
    generator_optimizer.zero_grad()
    fabric.backward(generator_loss)
    generator_optimizer.step()
    fabric.print(f"{critic_loss.item():.5f} {generator_loss.item():.5f}")
