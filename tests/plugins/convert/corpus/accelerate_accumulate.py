"""Accumulation in Accelerate's context, clipped where gradients are synchronised."""

# ranks: 2
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
torch.manual_seed(0)
x = torch.cos(torch.arange(96.0)).view(24, 4)
dataloader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4 // accelerator.num_processes)
model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
loss_function = nn.MSELoss()
model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)
for epoch in range(2):
    for inputs, targets in dataloader:
        with accelerator.accumulate(model):
            outputs = model(inputs)
            loss = loss_function(outputs, targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    average = accelerator.reduce(loss.detach(), reduction="mean")
    accelerator.print(epoch, f"{average.item():.6f}")
