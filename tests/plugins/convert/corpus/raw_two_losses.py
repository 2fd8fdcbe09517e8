"""A contrastive pre-training, then a probe on the frozen encoder: two phases with an optimizer each."""

# ranks: 2
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def pretrain(encoder, loader, device):
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.02)
    for epoch in range(2):
        losses = []
        for x, _ in loader:
            x = x.to(device)
            a, b = encoder(x), encoder(x * 1.1)
            loss = -F.cosine_similarity(a, b.detach()).mean() + a.pow(2).mean() * 0.1
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"pretrain {epoch}: {sum(losses) / len(losses):.6f}")


def probe(encoder, head, loader, device):
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    correct = total = 0
    for epoch in range(2):
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            with torch.no_grad():
                features = encoder(x)
            logits = head(features)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            correct += (logits.argmax(1) == y).sum().item()
            total += y.numel()
        print(f"probe {epoch}: accuracy {100.0 * correct / total:.2f} %")


if __name__ == "__main__":
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(24, 4)
    loader = DataLoader(TensorDataset(x, x[:, :2].argmax(1)), batch_size=8)
    encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).to(device)
    head = nn.Linear(4, 2).to(device)
    pretrain(encoder, loader, device)
    probe(encoder, head, loader, device)
