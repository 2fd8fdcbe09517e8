"""Early Lite: a subclass with everything in ``run``."""

# ranks: 1
import torch
from lightning_lite.lite import LightningLite
from lightning_lite.utilities.seed import seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Lite(LightningLite):
    def run(self, hparams):
        self.hparams = hparams
        seed_everything(hparams["seed"])
        x = torch.sin(torch.arange(64.0)).view(16, 4)
        loader = DataLoader(TensorDataset(x, x[:, :2].argmax(1)), batch_size=8 // self.world_size)
        loader = self.setup_dataloaders(loader, replace_sampler=True)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=hparams["lr"])
        model, optimizer = self.setup(model, optimizer)
        for epoch in range(hparams["epochs"]):
            for data, target in loader:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(data), target)
                self.backward(loss)  # instead of loss.backward()
                optimizer.step()
            total = self.all_gather(loss.detach()).mean()
            self.print(f"epoch {epoch} loss {total:.6f}")
        if self.is_global_zero:
            self.print("finished on rank", self.global_rank)


if __name__ == "__main__":
    Lite(accelerator="cpu", devices=1).run({"seed": 1, "lr": 0.5, "epochs": 3})
