"""Several models in one prepare, in an order of its own."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True)
device = accelerator.device
torch.manual_seed(0)
gen = nn.Linear(2, 3)
disc = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(), nn.Linear(4, 1))
gen_opt = torch.optim.Adam(gen.parameters(), lr=0.01)
disc_opt = torch.optim.Adam(disc.parameters(), lr=0.01)
data = DataLoader(TensorDataset(torch.sin(torch.arange(48.0)).view(16, 3)), batch_size=8)
gen, disc, gen_opt, disc_opt, data = accelerator.prepare(gen, disc, gen_opt, disc_opt, data)
bce = nn.BCEWithLogitsLoss()
for epoch in range(2):
    for (real,) in data:
        noise = torch.linspace(-1, 1, 2 * len(real), device=device).view(-1, 2)
        fake = gen(noise)
        disc_opt.zero_grad()
        d_loss = bce(disc(real), torch.ones(len(real), 1, device=device))
        d_loss = d_loss + bce(disc(fake.detach()), torch.zeros(len(real), 1, device=device))
        accelerator.backward(d_loss)
        disc_opt.step()
        gen_opt.zero_grad()
        g_loss = bce(disc(fake), torch.ones(len(real), 1, device=device))
        accelerator.backward(g_loss)
        gen_opt.step()
    if accelerator.is_main_process:
        print(f"{epoch}: {d_loss.item():.5f} {g_loss.item():.5f}")
