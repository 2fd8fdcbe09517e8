"""Segmentation with skip connections: a loss per pixel and per image, the intersection over union, an uneven end"""

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, Dataset

# + from plugframe import Lite


def double_conv(inside, outside):
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(2, outside), nn.ReLU(inplace=True),
        nn.Conv2d(outside, outside, 3, padding=1), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = double_conv(1, 4), double_conv(4, 8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.conv, self.outc = double_conv(8, 4), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        return self.outc(self.conv(torch.cat([first, self.up(second)], dim=1)))


class Circles(Dataset):
    def __init__(self, size, seed):
        self.size, self.seed = size, seed

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        row, column = torch.rand(2, generator=generator) * 12
        y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
        mask = ((y - row) ** 2 + (x - column) ** 2 < 16).float()[None]
        return mask + 0.5 * torch.randn(1, 12, 12, generator=generator), mask


def dice_loss(logits, mask):
    probability = torch.sigmoid(logits)
    overlap = (probability * mask).sum((1, 2, 3))
    return (1 - (2 * overlap + 1) / (probability.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)).mean()


torch.manual_seed(0)
# + lite = Lite()
train_loader = DataLoader(Circles(38, 1), batch_size=8, shuffle=True)  # -
# + train_loader = DataLoader(Circles(38, 1), batch_size=8 // lite.world_size, shuffle=True)
val_loader = DataLoader(Circles(15, 2), batch_size=4)
# + train_loader, val_loader = lite.setup_dataloaders(train_loader, val_loader)
net = UNet()
optimizer = optim.RMSprop(net.parameters(), lr=3e-3, momentum=0.5)
# + net, optimizer = lite.setup(net, optimizer)
for epoch in range(3):
    net.train()
    epoch_loss = 0.0
    for image, mask in train_loader:
        prediction = net(image)
        loss = F.binary_cross_entropy_with_logits(prediction, mask) + dice_loss(prediction, mask)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # -
        # + lite.backward(loss)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # -
        # + lite.clip_gradients(net, optimizer, max_norm=1.0)
        optimizer.step()
        # + loss = lite.reduce_mean(loss, weight=len(image))
        epoch_loss += loss.item()
    net.eval()
    intersection = union = 0
    with torch.no_grad():
        for image, mask in val_loader:
            prediction = net(image) > 0
            # + prediction, mask = lite.gather_for_metrics((prediction, mask))
            intersection += (prediction & (mask > 0)).sum().item()
            union += (prediction | (mask > 0)).sum().item()
    print(f"epoch {epoch} loss {epoch_loss / len(train_loader):.4f} IoU {intersection / union:.4f}")  # -
    # + lite.print(f"epoch {epoch} loss {epoch_loss / len(train_loader):.4f} IoU {intersection / union:.4f}")
