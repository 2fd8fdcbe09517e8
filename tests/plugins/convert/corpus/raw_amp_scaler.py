"""float16 with a gradient scaler, which unscales before it clips."""

# ranks: 2
import torch
from torch import nn
from torch.amp import GradScaler, autocast
from torch.utils.data import DataLoader, TensorDataset


# tolerance: 0.02
def main():
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    loader = DataLoader(TensorDataset(x, x.norm(dim=1, keepdim=True)), batch_size=8)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    scaler = GradScaler("cpu")
    for epoch in range(3):
        for inputs, targets in loader:
            optimizer.zero_grad(set_to_none=True)
            with autocast("cpu", dtype=torch.float16):
                loss = nn.functional.mse_loss(model(inputs), targets)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            scaler.step(optimizer)
            scaler.update()
        print(epoch, f"{loss.item():.4f}")


if __name__ == "__main__":
    main()
