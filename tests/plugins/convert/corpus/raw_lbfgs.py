"""L-BFGS with a closure."""

# ranks: 2
import torch
from torch import nn

torch.manual_seed(0)
x = torch.linspace(0, 3, 12).unsqueeze(1)
y = torch.sin(x)
model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
criterion = nn.MSELoss()
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3)
for i in range(3):

    def closure():
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    print(i, f"{loss.item():.6f}")
