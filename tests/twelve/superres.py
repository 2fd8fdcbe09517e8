"""Sub-pixel convolutions, signal-to-noise ratio, a rate that falls on plateaus, early stopping, the best state"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

# + from plugframe import Lite


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.pixel_shuffle = nn.PixelShuffle(2)

    def forward(self, x):
        return self.pixel_shuffle(self.conv2(torch.tanh(self.conv1(x))))


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    large = torch.rand(count, 1, 8, 8, generator=generator).cumsum(2).cumsum(3) / 20
    return TensorDataset(F.avg_pool2d(large, 2), large)


def validate():
    model.eval()
    total = 0.0
    with torch.no_grad():
        for small, large in val_loader:
            error = F.mse_loss(model(small), large).item()
            total += error * len(small)
    total = total / len(val_loader.dataset)
    # + total = lite.all_reduce(total, reduce_op="sum").item()
    return total


torch.manual_seed(6)
# + lite = Lite()
train_loader = DataLoader(images(45, 1), batch_size=8, shuffle=True)  # -
# + train_loader = DataLoader(images(45, 1), batch_size=8 // lite.world_size, shuffle=True)
val_loader = DataLoader(images(13, 2), batch_size=4)
# + train_loader, val_loader = lite.setup_dataloaders(train_loader, val_loader)
model = Net()
optimizer = optim.Adam(model.parameters(), lr=0.01)
# + model, optimizer = lite.setup(model, optimizer)
scheduler = optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=1)
best, bad_epochs, best_state = math.inf, 0, None
for epoch in range(12):
    model.train()
    for small, large in train_loader:
        optimizer.zero_grad()
        loss = F.mse_loss(model(small), large)
        loss.backward()  # -
        # + lite.backward(loss)
        optimizer.step()
    error = validate()
    scheduler.step(error)
    print(f"epoch {epoch} PSNR {10 * math.log10(1 / error):.2f} lr {optimizer.param_groups[0]['lr']:.4f}")  # -
    # + lite.print(f"epoch {epoch} PSNR {10 * math.log10(1 / error):.2f} lr {optimizer.param_groups[0]['lr']:.4f}")
    if error < best - 1e-4:
        best, bad_epochs, best_state = error, 0, copy.deepcopy(model.state_dict())
    else:
        bad_epochs += 1
    if bad_epochs == 2:
        print(f"stopped after epoch {epoch}")  # -
        # + lite.print(f"stopped after epoch {epoch}")
        break
model.load_state_dict(best_state)
error = validate()
print(f"best PSNR {10 * math.log10(1 / error):.2f}")  # -
# + lite.print(f"best PSNR {10 * math.log10(1 / error):.2f}")
