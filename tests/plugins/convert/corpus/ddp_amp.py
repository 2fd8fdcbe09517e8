"""DDP with mixed precision, several extra arguments for spawn, and clipping."""

# ranks: 2
# tolerance: 0.02
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


def worker(rank, world_size, lr, epochs):
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29544", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    data = TensorDataset(x, x.norm(dim=1, keepdim=True))
    sampler = DistributedSampler(data, shuffle=False)
    loader = DataLoader(data, batch_size=8 // world_size, sampler=sampler)
    model = DDP(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for a, b in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.l1_loss(model(a), b)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if rank == 0:
                print(f"epoch {epoch}: {loss.item():.4f}")
    dist.destroy_process_group()


def main():
    world_size = max(1, torch.cuda.device_count())
    mp.spawn(worker, nprocs=world_size, args=(world_size, 0.1, 2))


if __name__ == "__main__":
    main()
