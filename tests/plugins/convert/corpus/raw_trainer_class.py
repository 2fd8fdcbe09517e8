"""A trainer class that holds model, loaders and optimizer."""

# ranks: 2
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Trainer:
    def __init__(self, model, loader, lr):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)
        self.loader = loader
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)

    def train_step(self, source, targets):
        self.optimizer.zero_grad()
        output = self.model(source)
        loss = F.cross_entropy(output, targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def train_epoch(self, epoch):
        total = 0.0
        for source, targets in self.loader:
            source = source.to(self.device)
            targets = targets.to(self.device)
            total += self.train_step(source, targets)
        print(f"epoch {epoch} loss {total / len(self.loader):.6f}")

    def train(self, epochs):
        for epoch in range(epochs):
            self.train_epoch(epoch)


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(24, 4)
    data = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8)
    trainer = Trainer(nn.Linear(4, 3), data, lr=0.2)
    trainer.train(3)
