"""Cross-validation: a model, an optimizer and loaders for each fold."""

# ranks: 2
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

torch.manual_seed(0)
x = torch.randn(24, 3)
dataset = TensorDataset(x, x.sum(1, keepdim=True))
folds = [list(range(i, 24, 3)) for i in range(3)]
for number, held_out in enumerate(folds):
    torch.manual_seed(number)
    rest = [i for fold in folds if fold is not held_out for i in fold]
    train_loader = DataLoader(Subset(dataset, rest), batch_size=4)
    test_loader = DataLoader(Subset(dataset, held_out), batch_size=4)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for a, b in train_loader:
            optimizer.zero_grad()
            nn.functional.l1_loss(model(a), b).backward()
            optimizer.step()
    model.eval()
    error = 0.0
    with torch.no_grad():
        for a, b in test_loader:
            error += (model(a) - b).abs().sum().item()
    print(f"fold {number}: {error / len(held_out):.6f}")
