"""Everything at the top of the module."""

# ranks: 2
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.randn(24, 4)
y = x.sum(dim=1, keepdim=True)

loader = DataLoader(TensorDataset(x, y), batch_size=8)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(device)
loss_fn = nn.MSELoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

for epoch in range(3):
    for step, (a, b) in enumerate(loader):
        a = a.to(device)
        b = b.to(device)
        pred = model(a)
        loss = loss_fn(pred, b)

        # Backpropagation
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"{epoch}.{step}: {loss.item():.6f}")
