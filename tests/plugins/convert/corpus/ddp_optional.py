"""Distributed if there is more than one process, with a sampler that may be None, and no_sync."""

# ranks: 2
import argparse
import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main(args):
    args.world_size = int(os.environ.get("WORLD_SIZE", 1))
    args.distributed = args.world_size > 0
    if args.distributed:
        dist.init_process_group(backend="gloo", init_method="env://")
    torch.manual_seed(args.seed)
    x = torch.randn(32, 3)
    dataset = TensorDataset(x, x.prod(1, keepdim=True))
    train_sampler = torch.utils.data.distributed.DistributedSampler(dataset, shuffle=False) if args.distributed else None
    loader = DataLoader(
        dataset, batch_size=args.batch_size // args.world_size, shuffle=(train_sampler is None), sampler=train_sampler
    )
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    if args.distributed:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(args.epochs):
        if args.distributed:
            train_sampler.set_epoch(epoch)
        for i, (a, b) in enumerate(loader):
            last = i % 2 == 1
            context = contextlib.nullcontext() if last else model.no_sync()
            with context:
                loss = nn.functional.mse_loss(model(a), b) / 2
                loss.backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()
        total = torch.tensor([loss.item()])
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print("epoch", epoch, "loss", round((total / args.world_size).item(), 6))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args([]))
