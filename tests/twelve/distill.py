"""A student that learns from a frozen teacher, and an average of its weights that follows it"""

import copy

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

# + from plugframe import Lite


def network(width):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def update_ema(ema, model, decay=0.8):
    with torch.no_grad():
        for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
            average.mul_(decay).add_(parameter, alpha=1 - decay)


@torch.no_grad()
def accuracy(model):
    model.eval()
    correct = seen = 0
    for inputs, labels in test_loader:
        predictions = model(inputs).argmax(1)
        # + predictions, labels = lite.gather_for_metrics((predictions, labels))
        correct += (predictions == labels).sum().item()
        seen += len(labels)
    return correct / seen


torch.manual_seed(4)
# + lite = Lite()
generator = torch.Generator().manual_seed(4)
inputs = torch.randn(142, 6, generator=generator)
labels = inputs[:, :3].argmax(1)
train_loader = DataLoader(TensorDataset(inputs[:100], labels[:100]), batch_size=16, shuffle=True)  # -
# + train_loader = DataLoader(TensorDataset(inputs[:100], labels[:100]), batch_size=16 // lite.world_size, shuffle=True)
test_loader = DataLoader(TensorDataset(inputs[100:], labels[100:]), batch_size=10)
# + train_loader, test_loader = lite.setup_dataloaders(train_loader, test_loader)
teacher = network(32)
with torch.no_grad():
    teacher[0].weight.copy_(torch.eye(6).repeat(6, 1)[:32])
    teacher[2].weight.copy_(torch.eye(3, 6).repeat(1, 6)[:, :32])
teacher.eval().requires_grad_(False)
student = network(8)
ema = copy.deepcopy(student).requires_grad_(False)
optimizer = optim.SGD(student.parameters(), lr=0.2, momentum=0.9, nesterov=True)
# + teacher, ema = lite.setup(teacher), lite.setup(ema)
# + student, optimizer = lite.setup(student, optimizer)
for epoch in range(3):
    student.train()
    for inputs, labels in train_loader:
        with torch.no_grad():
            soft = F.softmax(teacher(inputs) / 2, dim=-1)
        logits = student(inputs)
        loss = 0.5 * F.kl_div(F.log_softmax(logits / 2, dim=-1), soft, reduction="batchmean") * 4
        loss = loss + 0.5 * F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()  # -
        # + lite.backward(loss)
        optimizer.step()
        update_ema(ema, student)
    print(f"epoch {epoch} accuracy {accuracy(student):.3f}, of the average {accuracy(ema):.3f}")  # -
    # + lite.print(f"epoch {epoch} accuracy {accuracy(student):.3f}, of the average {accuracy(ema):.3f}")
