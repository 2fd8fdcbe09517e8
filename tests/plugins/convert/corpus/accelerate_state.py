"""States saved and loaded, the main process makes a folder, the unwrapped model is saved."""

# ranks: 2
import os
import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main():
    accelerator = Accelerator(cpu=True)
    folder = os.path.join(tempfile.gettempdir(), "accelerate")
    if accelerator.is_main_process:
        os.makedirs(folder, exist_ok=True)
    accelerator.wait_for_everyone()
    torch.manual_seed(1)
    x = torch.sin(torch.arange(48.0)).view(16, 3)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    loader = DataLoader(TensorDataset(x, x[:, :2].argmax(1)), batch_size=8 // accelerator.num_processes)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(scheduler)
    for epoch in range(3):
        for a, b in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(a), b)
            accelerator.backward(loss)
            optimizer.step()
        scheduler.step()
        if epoch == 0:
            accelerator.save_state(os.path.join(folder, "state"))
        accelerator.print(f"{epoch} {accelerator.gather(loss).mean().item():.6f}")
    accelerator.load_state(os.path.join(folder, "state"))
    unwrapped = accelerator.unwrap_model(model)
    if accelerator.is_local_main_process:
        print(f"restored {unwrapped.weight.sum().item():.6f}")


if __name__ == "__main__":
    main()
