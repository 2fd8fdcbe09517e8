"""Graph convolutions on one graph: no loader, masks instead of batches, the best validation accuracy"""

import torch
import torch.nn.functional as F
from torch import nn, optim

# + from plugframe import Lite


class GCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x, adj):
        return self.lin2(adj @ F.relu(self.lin1(adj @ x)))


torch.manual_seed(5)
# + lite = Lite()
generator = torch.Generator().manual_seed(5)
y = torch.randint(3, (60,), generator=generator)
x = F.one_hot(y, 8) + 1.5 * torch.randn(60, 8, generator=generator)
edges = torch.rand(60, 60, generator=generator) < torch.where(y[:, None] == y[None], 0.2, 0.03)
adj = (edges | edges.t()).float() + torch.eye(60)
degree = adj.sum(1).rsqrt()
adj = degree[:, None] * adj * degree[None]
train_mask, val_mask = torch.arange(60) < 15, (torch.arange(60) >= 15) & (torch.arange(60) < 35)
test_mask = torch.arange(60) >= 35
model = GCN()
optimizer = optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
# + model, optimizer = lite.setup(model, optimizer)
# + x, y, adj, train_mask, val_mask, test_mask = lite.to_device((x, y, adj, train_mask, val_mask, test_mask))
best_val = test_acc = 0.0
for epoch in range(1, 13):
    model.train()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x, adj)[train_mask], y[train_mask])
    loss.backward()  # -
    # + lite.backward(loss)
    optimizer.step()
    model.eval()
    with torch.no_grad():
        pred = model(x, adj).argmax(dim=1)
    val = (pred[val_mask] == y[val_mask]).float().mean().item()
    if val > best_val:
        best_val, test_acc = val, (pred[test_mask] == y[test_mask]).float().mean().item()
    if epoch % 4 == 0:
        print(f"epoch {epoch} loss {loss.item():.4f} val {best_val:.3f} test {test_acc:.3f}")  # -
        # + lite.print(f"epoch {epoch} loss {loss.item():.4f} val {best_val:.3f} test {test_acc:.3f}")
