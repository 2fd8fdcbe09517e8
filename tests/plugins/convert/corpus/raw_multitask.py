"""Two heads, a weighted sum of their losses, a dict of metrics in the batch's order."""

# ranks: 2
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Data(Dataset):
    def __init__(self):
        self.x = torch.sin(torch.arange(60.0)).view(20, 3)

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return {"x": self.x[i], "label": (self.x[i, 0] > 0).long(), "value": self.x[i].sum()}


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 6)
        self.classify = nn.Linear(6, 2)
        self.regress = nn.Linear(6, 1)

    def forward(self, x):
        h = torch.relu(self.body(x))
        return self.classify(h), self.regress(h).squeeze(1)


def main():
    torch.manual_seed(0)
    model = Heads()
    opt = torch.optim.RMSprop(model.parameters(), lr=0.01)
    loader = DataLoader(Data(), batch_size=8, shuffle=False)
    for epoch in range(2):
        for batch in loader:
            batch = {k: v.to("cpu") for k, v in batch.items()}
            logits, values = model(batch["x"])
            loss_c = nn.functional.cross_entropy(logits, batch["label"])
            loss_r = nn.functional.mse_loss(values, batch["value"])
            loss = loss_c + 0.5 * loss_r
            opt.zero_grad()
            loss.backward()
            opt.step()
            print(f"{epoch} total {loss.item():.5f} = {loss_c.item():.5f} + {loss_r.item():.5f} / 2")


main()
