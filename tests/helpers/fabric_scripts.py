"""Training scripts in the style of Fabric 2 and of early Lite, for tests: only where ``Lite`` comes from differs.

Each takes a class and a folder, trains for a moment on whatever ranks there are, and returns the last loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from plugframe import Lite as Fabric
from plugframe import Lite as LightningLite
from plugframe import seed_everything


def samples(number: int = 44) -> TensorDataset:
    """Return points and which of three classes they are in."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(number, 8, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(dim=1))


class Classifier(nn.Module):
    """A small network with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.dropout = nn.Dropout(0.25)
        self.fc2 = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(self.fc2(self.dropout(F.relu(self.fc1(x)))), dim=1)


class Early(LightningLite):
    """A script of early Lite: everything in ``run``."""

    def run(self, folder: Path, epochs: int) -> float:
        seed_everything(1)
        if self.is_global_zero:
            folder.mkdir(exist_ok=True)
        self.barrier()
        data = samples()
        train_loader, test_loader = self.setup_dataloaders(
            DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=8)
        )
        model = Classifier()
        model, optimizer = self.setup(model, optim.Adadelta(model.parameters(), lr=1.0))
        scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
        for _ in range(epochs):
            model.train()
            for x, target in train_loader:
                optimizer.zero_grad()
                self.backward(F.nll_loss(model(x), target))
                optimizer.step()
            scheduler.step()
            model.eval()
            seen = loss = 0.0
            with torch.no_grad():
                for x, target in test_loader:
                    loss += F.nll_loss(model(x), target, reduction="sum").item()
                    seen += len(x)
            seen = int(self.all_gather(seen).sum())
            assert seen == len(data)
            self.print(f"loss {self.all_gather(loss).sum() / seen:.3f}")
        self.save(model.state_dict(), folder / "early.pt")
        model.load_state_dict(self.load(folder / "early.pt"))
        return float(self.all_gather(loss).sum() / seen)


def early(folder: Path, **settings: Any) -> float:
    with Early(**settings) as lite:
        return lite.run(folder, epochs=2)


def gan(folder: Path, **settings: Any) -> float:
    """Two models that learn from one another, two backwards of one of them before its step."""
    fabric = Fabric(**settings)
    seed_everything(999)
    fabric.launch()
    generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(True), nn.Linear(16, 8))
    critic = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2, inplace=True), nn.Linear(16, 1), nn.Sigmoid())
    optimizers = [optim.Adam(model.parameters(), lr=2e-3, betas=(0.5, 0.999)) for model in (critic, generator)]
    critic, optimizer_d = fabric.setup(critic, optimizers[0])
    generator, optimizer_g = fabric.setup(generator, optimizers[1])
    loader = fabric.setup_dataloaders(DataLoader(samples(), batch_size=8, shuffle=True))
    for _ in range(2):
        for real, _ in loader:
            critic.zero_grad()
            ones = torch.ones(len(real), 1, device=fabric.device)
            real_score = critic(real)
            fake = generator(torch.randn(len(real), 4, device=fabric.device))
            fake_score = critic(fake.detach())
            fabric.backward(F.binary_cross_entropy(real_score, ones))
            fabric.backward(F.binary_cross_entropy(fake_score, 0 * ones))
            optimizer_d.step()
            generator.zero_grad()
            loss = F.binary_cross_entropy(critic(fake), ones)
            fabric.backward(loss)
            optimizer_g.step()
    fabric.barrier()
    for model in (generator, critic):
        for parameter in model.parameters():
            assert (fabric.all_gather(parameter.detach()) == parameter).all()
    fabric.teardown()
    return loss.item()


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Language(nn.Module):
    """A language model with tied weights, and a ``generate``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(2))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    @torch.no_grad()
    def generate(self, tokens: torch.Tensor, number: int) -> torch.Tensor:
        for _ in range(number):
            tokens = torch.cat([tokens, self(tokens[:, -8:])[:, -1:].argmax(-1)], dim=1)
        return tokens


class Tokens(IterableDataset[torch.Tensor]):
    """An endless stream of tokens."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randint(0, 32, (9,), generator=generator)


class Remember:
    """A callback."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_end(self, loss: torch.Tensor, step: int) -> None:
        assert loss.isfinite()
        self.steps.append(step)


def pretrain(folder: Path, **settings: Any) -> float:
    """Pre-training: a module built in place, set up apart from its optimizer, accumulation, clipping, a resume."""
    callback = Remember()
    fabric = Fabric(precision="bf16-mixed", callbacks=[callback], **settings)
    loss = fabric.launch(_pretrain, folder / "iter-000007-ckpt.pth")
    assert callback.steps == [1, 2, 3, 4, 5, 6]
    fabric.teardown()
    assert isinstance(loss, float)
    return loss


def _pretrain(fabric: Any, path: Path) -> float:
    fabric.seed_everything(1337)
    with fabric.rank_zero_first(), fabric.rank_zero_first(local=True):
        data = Tokens()
    batches = iter(fabric.setup_dataloaders(DataLoader(data, batch_size=4)))
    with fabric.init_module(empty_init=False):
        model = Language()
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), foreach=False))
    state = {"model": model, "optimizer": optimizer, "iter_num": 0, "step_count": 0}
    for state["iter_num"] in range(12):
        batch = next(batches)
        is_accumulating = (state["iter_num"] + 1) % 2 != 0
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            fabric.backward(loss / 2)
        if not is_accumulating:
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            state["step_count"] += 1
            fabric.call("on_train_batch_end", loss.detach(), state["step_count"])
        if state["iter_num"] == 7:
            fabric.save(path, state)
    assert model.generate(torch.zeros(1, 1, dtype=torch.long), 4).shape == (1, 5)
    assert fabric.load(path)["iter_num"] == 7
    assert sorted(fabric.load(path, {"model": model})) == ["iter_num", "optimizer", "step_count"]
    return float(fabric.all_reduce(loss.detach(), reduce_op="mean"))


class LitModule(Classifier):
    """A module with steps of its own, as trainers call them."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.nll_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.nll_loss(F.log_softmax(self.fc2(F.relu(self.fc1(batch[0]))), dim=1), batch[1])


def trainer(folder: Path, **settings: Any) -> float:
    """A trainer of one's own, in two runs: the second goes on from the checkpoint of the first."""
    path = folder / "trainer.ckpt"
    for max_epochs in (1, 2):
        fabric = Fabric(**settings)
        fabric.launch()
        data = samples()
        train = fabric.setup_dataloaders(DataLoader(data, 8, shuffle=True), use_distributed_sampler=True)
        val = fabric.setup_dataloaders(DataLoader(data, 8), move_to_device=True)
        model = LitModule()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, scheduler = fabric.setup(model, optimizer, scheduler=StepLR(optimizer, 1))
        model.mark_forward_method("training_step")
        model.mark_forward_method(model.validation_step)
        state = {"model": model, "optim": optimizer, "scheduler": scheduler, "epoch": 0}
        if path.is_file():
            assert fabric.load(path, state, strict=True) == {}
        assert state["epoch"] == max_epochs - 1
        for epoch in range(state["epoch"], max_epochs):
            model.train()
            for index, batch in enumerate(train):
                loss = model.training_step(batch, batch_idx=index)
                fabric.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            model.eval()
            torch.set_grad_enabled(False)
            losses = torch.stack([model.validation_step(batch, index) for index, batch in enumerate(val)])
            torch.set_grad_enabled(True)
            scheduler.step()
            state["epoch"] = epoch + 1
            fabric.save(path, state, filter={"model": lambda name, value: True})
        fabric.teardown()
    return float(losses.mean())


SCRIPTS = (early, gan, pretrain, trainer)
