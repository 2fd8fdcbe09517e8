"""``import lightning as L``, ``launch``, accumulation without synchronisation, clipping, a checkpoint."""

# ranks: 2
import os
import tempfile

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


def validate(fabric: L.Fabric, model, loader):
    model.eval()
    with torch.no_grad():
        losses = torch.stack([torch.nn.functional.mse_loss(model(x), y) for x, y in loader])
    model.train()
    return fabric.all_reduce(losses.mean(), reduce_op="mean")


def main():
    fabric = L.Fabric(accelerator="cpu", precision="32-true")
    fabric.launch()
    fabric.seed_everything(3)
    x = torch.cos(torch.arange(64.0)).view(16, 4)
    dataset = TensorDataset(x, x.prod(1, keepdim=True))
    loader = fabric.setup_dataloaders(DataLoader(dataset, batch_size=4 // fabric.world_size))
    with fabric.init_module():
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    state = {"model": model, "optimizer": optimizer, "step": 0}
    for step, (a, b) in enumerate(loader):
        is_accumulating = step % 2 == 0
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            loss = torch.nn.functional.mse_loss(model(a), b)
            fabric.backward(loss / 2)
        if not is_accumulating:
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            state["step"] += 1
    path = os.path.join(tempfile.gettempdir(), "fabric.ckpt")
    fabric.save(path, state)
    fabric.load(path, state)
    fabric.print(state["step"], f"{validate(fabric, model, loader).item():.6f}")


if __name__ == "__main__":
    main()
