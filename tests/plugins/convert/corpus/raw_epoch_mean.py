"""Losses weighted by samples over an epoch, and an uneven last batch."""

# ranks: 2
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def evaluate(model, loader, criterion):
    model.eval()
    total = 0.0
    count = 0
    with torch.no_grad():
        for x, y in loader:
            loss = criterion(model(x), y)
            total += loss.item() * x.size(0)
            count += x.size(0)
    return total / count


def main():
    torch.manual_seed(0)
    x = torch.randn(22, 3)
    y = torch.sin(x.sum(1, keepdim=True))
    train_loader = DataLoader(TensorDataset(x, y), batch_size=8)
    val_loader = DataLoader(TensorDataset(x[:9], y[:9]), batch_size=4)
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 1))
    criterion = nn.MSELoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for epoch in range(3):
        model.train()
        epoch_loss = 0.0
        for xb, yb in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(xb), yb)
            loss.backward()
            optimizer.step()
            epoch_loss += loss.item() * xb.size(0)
        epoch_loss /= len(train_loader.dataset)
        val_loss = evaluate(model, val_loader, criterion)
        print(f"epoch {epoch}: train {epoch_loss:.6f} val {val_loss:.6f}")


if __name__ == "__main__":
    main()
