"""A convolutional network on small images, with the accuracy on a test set after each epoch"""

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

# + from plugframe import Lite


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.conv2 = nn.Conv2d(4, 8, 3)
        self.dropout = nn.Dropout(0.25)
        self.fc1 = nn.Linear(8 * 2 * 2, 16)
        self.fc2 = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = self.dropout(torch.flatten(x, 1))
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1)


def digits(count, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(10, (count,), generator=generator)
    return TensorDataset(3 * shapes[labels] + 0.2 * torch.randn(count, 1, 8, 8, generator=generator), labels)


def train(epoch):
    model.train()
    for batch_idx, (data, target) in enumerate(train_loader):
        data, target = data.to(device), target.to(device)  # -
        optimizer.zero_grad()
        output = model(data)
        loss = F.nll_loss(output, target)
        loss.backward()  # -
        # + lite.backward(loss)
        optimizer.step()
        if batch_idx % 4 == 0:
            # + loss = lite.reduce_mean(loss, weight=len(data))
            print(f"epoch {epoch} batch {batch_idx} loss {loss.item():.4f}")  # -
            # + lite.print(f"epoch {epoch} batch {batch_idx} loss {loss.item():.4f}")


def test():
    model.eval()
    test_loss = correct = 0
    with torch.no_grad():
        for data, target in test_loader:
            data, target = data.to(device), target.to(device)  # -
            output = model(data)
            # + output, target = lite.gather_for_metrics((output, target))
            test_loss += F.nll_loss(output, target, reduction="sum").item()
            correct += output.argmax(dim=1).eq(target).sum().item()
    size = len(test_loader.dataset)
    print(f"test loss {test_loss / size:.4f}, accuracy {correct}/{size}")  # -
    # + lite.print(f"test loss {test_loss / size:.4f}, accuracy {correct}/{size}")


device = torch.device("cpu")  # -
torch.manual_seed(1)  # -
# + lite = Lite()
# + lite.seed_everything(1, per_rank=True)
train_loader = DataLoader(digits(150, 1), batch_size=16, shuffle=True)  # -
# + train_loader = DataLoader(digits(150, 1), batch_size=16 // lite.world_size, shuffle=True)
test_loader = DataLoader(digits(51, 2), batch_size=20)
# + train_loader, test_loader = lite.setup_dataloaders(train_loader, test_loader)
model = Net().to(device)  # -
# + model = Net()
optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
# + model, optimizer = lite.setup(model, optimizer)
scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
for epoch in range(1, 4):
    train(epoch)
    test()
    scheduler.step()
