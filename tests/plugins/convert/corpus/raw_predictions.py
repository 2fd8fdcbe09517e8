"""An evaluation that keeps all predictions, of all ranks."""

# ranks: 2
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(20, 4)
labels = x[:, :3].argmax(1)
train_loader = DataLoader(TensorDataset(x, labels), batch_size=4)
test_loader = DataLoader(TensorDataset(x, labels), batch_size=8)
model = nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
for a, b in train_loader:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(a), b)
    loss.backward()
    optimizer.step()
    print(f"{loss.item():.5f}")

model.eval()
all_preds, all_labels = [], []
with torch.no_grad():
    for a, b in test_loader:
        all_preds.append(model(a).argmax(dim=1))
        all_labels.append(b)
correct = (torch.cat(all_preds) == torch.cat(all_labels)).float().mean()
print("accuracy", correct.item())
