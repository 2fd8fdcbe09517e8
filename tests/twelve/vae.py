"""A variational autoencoder: a loss that is a sum, noise in forward, and methods besides forward"""

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader

# + from plugframe import Lite


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(36, 16)
        self.fc21 = nn.Linear(16, 4)
        self.fc22 = nn.Linear(16, 4)
        self.fc3 = nn.Linear(4, 16)
        self.fc4 = nn.Linear(16, 36)

    def encode(self, x):
        h = F.relu(self.fc1(x))
        return self.fc21(h), self.fc22(h)

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def decode(self, z):
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z))))

    def forward(self, x):
        mu, logvar = self.encode(x)
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar


def loss_function(recon_x, x, mu, logvar):
    bce = F.binary_cross_entropy(recon_x.float(), x, reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return bce + kld


torch.manual_seed(1)  # -
# + lite = Lite()
# + lite.seed_everything(1, per_rank=True)
images = torch.rand(128, 36, generator=torch.Generator().manual_seed(2)).round()
train_loader = DataLoader(images[:96], batch_size=16, shuffle=True)  # -
# + train_loader = DataLoader(images[:96], batch_size=16 // lite.world_size, shuffle=True)
test_loader = DataLoader(images[96:], batch_size=16)  # -
# + test_loader = DataLoader(images[96:], batch_size=16 // lite.world_size)
# + train_loader, test_loader = lite.setup_dataloaders(train_loader, test_loader)
model = VAE()
optimizer = optim.Adam(model.parameters(), lr=3e-3)
# + model, optimizer = lite.setup(model, optimizer)

for epoch in range(1, 4):
    model.train()
    train_loss = 0.0
    for data in train_loader:
        optimizer.zero_grad()
        recon, mu, logvar = model(data)
        loss = loss_function(recon, data, mu, logvar)
        loss.backward()  # -
        # + lite.backward(loss, reduction="sum")
        train_loss += loss.item()
        optimizer.step()
    # + train_loss = lite.all_reduce(train_loss, reduce_op="sum").item()
    print(f"epoch {epoch} average loss {train_loss / len(train_loader.dataset):.3f}")  # -
    # + lite.print(f"epoch {epoch} average loss {train_loss / len(train_loader.dataset):.3f}")
    model.eval()
    test_loss = 0.0
    with torch.no_grad():
        for data in test_loader:
            mu, logvar = model.encode(data)
            loss = loss_function(model.decode(mu), data, mu, logvar)
            test_loss += loss.item()
    # + test_loss = lite.all_reduce(test_loss, reduce_op="sum").item()
    print(f"test loss {test_loss / len(test_loader.dataset):.3f}")  # -
    # + lite.print(f"test loss {test_loss / len(test_loader.dataset):.3f}")
with torch.no_grad():
    sample = model.decode(torch.linspace(-1, 1, 8).reshape(2, 4))
print(f"sample mean {sample.mean().item():.3f}")  # -
# + lite.print(f"sample mean {sample.mean().item():.3f}")
