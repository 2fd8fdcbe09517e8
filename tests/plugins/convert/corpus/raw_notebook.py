# %% [markdown]
# # A notebook, as a script with cells

# ranks: 2

# %%
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(42)

# %% Data
X = torch.linspace(0, 1, 24).unsqueeze(1)
Y = 0.7 * X + 0.3
train_loader = DataLoader(TensorDataset(X, Y), batch_size=12)

# %% Model


class LinearRegressionModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(1))
        self.bias = nn.Parameter(torch.randn(1))

    def forward(self, x):
        return self.weights * x + self.bias


model_0 = LinearRegressionModel()
list(model_0.parameters())

# %% Training
loss_fn = nn.L1Loss()
optimizer = torch.optim.SGD(params=model_0.parameters(), lr=0.05)
epoch_count, loss_values = [], []
for epoch in range(4):
    model_0.train()
    for X_batch, y_batch in train_loader:
        y_pred = model_0(X_batch)
        loss = loss_fn(y_pred, y_batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    epoch_count.append(epoch)
    loss_values.append(loss.item())

# %% Results
print([round(v, 5) for v in loss_values])
print(model_0.state_dict())
