"""A script for torchrun: ranks from the environment, rank 0 prints and saves, losses are averaged by hand."""

# ranks: 2
import os
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def is_main_process():
    return dist.get_rank() == 0


def reduce_mean(tensor):
    tensor = tensor.clone()
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    tensor /= dist.get_world_size()
    return tensor


def train_one_epoch(model, loader, optimizer, epoch):
    model.train()
    loader.sampler.set_epoch(epoch)
    losses = []
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(reduce_mean(loss.detach()).item())
    return sum(losses) / len(losses)


def main():
    local_rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group(backend="gloo")
    torch.manual_seed(0)
    x = torch.randn(24, 4)
    dataset = TensorDataset(x, x[:, :3].argmax(1))
    loader = DataLoader(
        dataset,
        batch_size=24 // dist.get_world_size(),
        sampler=DistributedSampler(dataset, shuffle=False),
        num_workers=0,
    )
    model = nn.Linear(4, 3)
    model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    path = os.path.join(tempfile.gettempdir(), "ddp.pt")
    best = float("inf")
    for epoch in range(3):
        loss = train_one_epoch(model, loader, optimizer, epoch)
        if is_main_process():
            print(f"epoch {epoch} loss {loss:.6f}")
        if is_main_process() and loss < best:
            best = loss
            torch.save({"model": model.module.state_dict(), "epoch": epoch}, path)
    dist.barrier()
    if local_rank == 0:
        print("done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
