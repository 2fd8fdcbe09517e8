"""Rank 0 makes a folder, writes a log and saves; the others wait. Rank variables come in by arguments."""

# ranks: 2
import json
import os
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


class Runner:
    def __init__(self, rank, world_size):
        self.rank = rank
        self.world_size = world_size
        torch.manual_seed(0)
        x = torch.randn(12, 2)
        self.dataset = TensorDataset(x, x.sum(1, keepdim=True))
        self.sampler = DistributedSampler(self.dataset, shuffle=False)
        self.loader = DataLoader(self.dataset, batch_size=6 // world_size, sampler=self.sampler)
        self.model = DistributedDataParallel(nn.Linear(2, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def run(self, epochs, folder):
        log = []
        for epoch in range(epochs):
            self.sampler.set_epoch(epoch)
            epoch_loss = 0.0
            for x, y in self.loader:
                self.optimizer.zero_grad()
                loss = nn.functional.mse_loss(self.model(x), y)
                loss.backward()
                self.optimizer.step()
                epoch_loss += loss.item()
            epoch_loss /= len(self.loader)
            if self.rank == 0:
                os.makedirs(folder, exist_ok=True)
                log.append({"epoch": epoch, "loss": epoch_loss})
                with open(os.path.join(folder, "log.json"), "w") as file:
                    json.dump(log, file)
                path = os.path.join(folder, f"model-{epoch}.pt")
                torch.save({"model": self.model.module.state_dict()}, path)
                print(f"epoch {epoch}: {epoch_loss:.6f}")
        dist.barrier()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    runner = Runner(dist.get_rank(), dist.get_world_size())
    runner.run(2, os.path.join(tempfile.gettempdir(), "run"))
    dist.destroy_process_group()
