"""A generator against a discriminator: two models, two optimizers, batch normalisation, a detached half step"""

import torch
from torch import nn, optim
from torch.utils.data import DataLoader

# + from plugframe import Lite


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(6, 8, 4, 1, 0, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
            nn.ConvTranspose2d(8, 1, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, noise):
        return self.main(noise)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(1, 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(8, 1, 4, 1, 0, bias=False),
        )

    def forward(self, image):
        return self.main(image).view(-1)


def weights_init(m):
    if "Conv" in m.__class__.__name__:
        nn.init.normal_(m.weight, 0.0, 0.05)


torch.manual_seed(1)  # -
# + lite = Lite()
# + lite.seed_everything(1, per_rank=True)
batch_size = 16  # -
# + batch_size = 16 // lite.world_size
images = torch.rand(96, 1, 8, 8, generator=torch.Generator().manual_seed(2)).cumsum(2).tanh()
loader = DataLoader(images, batch_size=batch_size, shuffle=True)
# + loader = lite.setup_dataloaders(loader)
netG, netD = Generator(), Discriminator()
netG.apply(weights_init)
netD.apply(weights_init)
# + netG, netD = nn.SyncBatchNorm.convert_sync_batchnorm(netG), nn.SyncBatchNorm.convert_sync_batchnorm(netD)
optimizerD = optim.Adam(netD.parameters(), lr=2e-3, betas=(0.5, 0.999))
optimizerG = optim.Adam(netG.parameters(), lr=2e-3, betas=(0.5, 0.999))
# + netD, optimizerD = lite.setup(netD, optimizerD)
# + netG, optimizerG = lite.setup(netG, optimizerG)
criterion = nn.BCEWithLogitsLoss()

for epoch in range(2):
    for i, real in enumerate(loader):
        netD.zero_grad()
        label = torch.ones(len(real))  # -
        # + label = torch.ones(len(real), device=lite.device)
        errD_real = criterion(netD(real), label)
        errD_real.backward()  # -
        # + lite.backward(errD_real, model=netD)
        noise = torch.randn(len(real), 6, 1, 1)  # -
        # + noise = torch.randn(len(real), 6, 1, 1, device=lite.device)
        fake = netG(noise)
        errD_fake = criterion(netD(fake.detach()), torch.zeros_like(label))
        errD_fake.backward()  # -
        # + lite.backward(errD_fake, model=netD)
        optimizerD.step()

        netG.zero_grad()
        errG = criterion(netD(fake), label)
        errG.backward()  # -
        # + lite.backward(errG, model=netG)
        optimizerG.step()
        if i % 3 == 0:
            errD = errD_real + errD_fake
            # + errD, errG = lite.reduce_mean((errD, errG), weight=len(real))
            print(f"{epoch} {i} loss D {errD.item():.3f} loss G {errG.item():.3f}")  # -
            # + lite.print(f"{epoch} {i} loss D {errD.item():.3f} loss G {errG.item():.3f}")
