"""Two views of each sample through one encoder, the other samples of the batch as negatives, retrieval as metric"""

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

# + from plugframe import Lite


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 8))

    def forward(self, x):
        return F.normalize(self.net(x).float(), dim=1)


def info_nce(z1, z2):
    logits = z1 @ z2.t() / 0.2
    labels = torch.arange(len(z1), device=z1.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def views(count, seed):
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(count, 12, generator=generator)
    return TensorDataset(*(content + 0.6 * torch.randn(count, 12, generator=generator) for _ in range(2)))


torch.manual_seed(3)
# + lite = Lite()
loader = DataLoader(views(96, 1), batch_size=16, shuffle=True)  # -
# + loader = DataLoader(views(96, 1), batch_size=16 // lite.world_size, shuffle=True)
test_loader = DataLoader(views(30, 2), batch_size=8)
# + loader, test_loader = lite.setup_dataloaders(loader, test_loader)
model = Encoder()
optimizer = optim.AdamW(model.parameters(), lr=5e-3)
# + model, optimizer = lite.setup(model, optimizer)
for epoch in range(4):
    model.train()
    for x1, x2 in loader:
        z1, z2 = model(x1), model(x2)
        # + z1, z2 = (z.flatten(0, 1) for z in lite.all_gather((z1, z2), sync_grads=True))
        loss = info_nce(z1, z2)
        optimizer.zero_grad()
        loss.backward()  # -
        # + lite.backward(loss)
        optimizer.step()
    model.eval()
    found = []
    with torch.no_grad():
        for x1, x2 in test_loader:
            found.append((model(x1), model(x2)))  # -
            # + found.append(lite.gather_for_metrics((model(x1), model(x2))))
    z1, z2 = (torch.cat(z) for z in zip(*found, strict=True))
    top1 = (z1 @ z2.t()).argmax(1).eq(torch.arange(len(z1))).sum().item()
    print(f"epoch {epoch} loss {loss.item():.4f} top-1 {top1}/{len(z1)}")  # -
    # + lite.print(f"epoch {epoch} loss {loss.item():.4f} top-1 {top1}/{len(z1)}")
