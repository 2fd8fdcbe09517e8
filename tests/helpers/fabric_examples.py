"""Training scripts of the kinds that Fabric's documentation shows, for tests: they use Fabric's names only.

Each takes a `Fabric` and a folder and returns a loss. With ``lightning`` for ``plugframe`` in the imports they run
under Lightning Fabric too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    random_split,
)

from plugframe.fabric import Fabric, is_wrapped, seed_everything
from plugframe.fabric.strategies import ModelParallelStrategy
from plugframe.fabric.utilities import AttributeDict, Throughput


def images(number: int = 44) -> TensorDataset:
    """Return images of 8 × 8 points, and which of three corners is bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (number,), generator=generator)
    x = 0.3 * torch.randn(number, 1, 8, 8, generator=generator)
    for label, (row, column) in enumerate(((0, 0), (0, 4), (4, 0))):
        x[labels == label, :, row : row + 4, column : column + 4] += 1
    return TensorDataset(x, labels)


class Net(nn.Module):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.dropout = nn.Dropout(0.25)
        self.fc = nn.Linear(4 * 3 * 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1)
        return F.log_softmax(self.fc(self.dropout(x)), dim=1)


def train_epoch(fabric: Any, model: nn.Module, optimizer: Any, loader: Any) -> None:
    model.train()
    for x, target in loader:
        optimizer.zero_grad()
        fabric.backward(F.nll_loss(model(x), target))
        optimizer.step()


def image_classifier(fabric: Any, folder: Path) -> float:
    """Train, evaluate and save a classifier; every rank reads its share of the test set."""
    fabric.seed_everything(1)
    with fabric.rank_zero_first(local=False):
        data = images()
    train, test = fabric.setup_dataloaders(DataLoader(data, 8, shuffle=True), DataLoader(data, 11))
    model = Net()
    optimizer = optim.Adadelta(model.parameters(), lr=1.0)
    assert not is_wrapped(model)
    model, optimizer = fabric.setup(model, optimizer)
    assert is_wrapped(model)
    assert is_wrapped(optimizer)
    assert is_wrapped(train)
    assert model.device == fabric.device
    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
    throughput = Throughput(world_size=fabric.world_size)
    for epoch in range(3):
        train_epoch(fabric, model, optimizer, train)
        scheduler.step()
        throughput.update(time=epoch + 1.0, batches=epoch, samples=epoch * 44 // fabric.world_size)
    model.eval()
    loss, correct = torch.zeros(()), torch.zeros(())
    with torch.no_grad():
        for x, target in test:
            output = model(x)
            loss += F.nll_loss(output, target, reduction="sum")
            correct += (output.argmax(1) == target).sum()
    loss = fabric.all_gather(loss).sum() / len(data)
    assert fabric.all_reduce(correct, reduce_op="sum") / len(data) > 0.6
    fabric.print(f"loss {loss:.3f}, {throughput.compute()['samples']} samples")
    fabric.save(folder / "mnist_cnn.pt", model.state_dict())
    return float(loss)


def kfold(fabric: Any, folder: Path) -> float:
    """Train a model for each of three folds, and average their predictions."""
    seed_everything(1)
    data = images()
    folds = [list(range(start, len(data), 3)) for start in range(3)]
    models: list[nn.Module] = []
    for number in range(3):
        ids = [index for other, fold in enumerate(folds) if other != number for index in fold]
        train = DataLoader(data, 8, sampler=SubsetRandomSampler(ids))
        val = DataLoader(data, 8, sampler=folds[number])
        train, val = fabric.setup_dataloaders(train, val)
        model = Net()
        model, optimizer = fabric.setup(model, optim.Adadelta(model.parameters(), lr=1.0))
        train_epoch(fabric, model, optimizer, train)
        model.eval()
        with torch.no_grad():
            for x, _ in val:
                assert model(x).isfinite().all()
        models.append(model)
    loader = fabric.setup_dataloaders(DataLoader(data, 11))
    total = 0.0
    with torch.no_grad():
        for x, target in loader:
            mean = torch.stack([model(x).exp() for model in models]).mean(0)
            total += F.nll_loss(mean.log(), target, reduction="sum").item()
    return float(fabric.all_gather(torch.tensor(total)).sum() / len(data))


def active_learning(fabric: Any, folder: Path) -> float:
    """Label, in each round, those samples of a pool that the model is least sure of."""
    seed_everything(1)
    data = images(48)
    labelled, pool = list(range(12)), list(range(12, 48))
    model = Net()
    model, optimizer = fabric.setup(model, optim.Adadelta(model.parameters(), lr=1.0))
    for _ in range(2):
        train_epoch(
            fabric, model, optimizer, fabric.setup_dataloaders(DataLoader(Subset(data, labelled), 6, shuffle=True))
        )
        model.eval()
        entropies = []
        with torch.no_grad():
            for x, _ in fabric.setup_dataloaders(DataLoader(Subset(data, pool), 6), use_distributed_sampler=False):
                output = model(x)
                entropies.append(-(output.exp() * output).sum(1))
        unsure = torch.cat(entropies).topk(6).indices.tolist()
        unsure = fabric.broadcast(unsure)
        labelled += [pool[index] for index in unsure]
        pool = [index for number, index in enumerate(pool) if number not in unsure]
    assert len(labelled) == 24
    with torch.no_grad():
        x, target = data.tensors
        loss = F.nll_loss(model(fabric.to_device(x)), fabric.to_device(target))
    return loss.item()


def dcgan(fabric: Any, folder: Path) -> float:
    """Train a generator against a discriminator, which gets two backwards before its step."""
    fabric.seed_everything(999)
    with fabric.init_module():
        generator = nn.Sequential(
            nn.ConvTranspose2d(6, 8, 4, bias=False), nn.BatchNorm2d(8), nn.ReLU(True), nn.ConvTranspose2d(8, 1, 2, 2)
        )
        discriminator = nn.Sequential(
            nn.Conv2d(1, 8, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(8, 1, 4), nn.Sigmoid(), nn.Flatten(0)
        )
    optimizer_d = optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    optimizer_g = optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    discriminator, optimizer_d = fabric.setup(discriminator, optimizer_d)
    generator, optimizer_g = fabric.setup(generator, optimizer_g)
    loader = fabric.setup_dataloaders(DataLoader(images(), 8, shuffle=True))
    fixed_noise = torch.randn(4, 6, 1, 1, device=fabric.device)
    for _ in range(2):
        for real, _ in loader:
            discriminator.zero_grad()
            ones = torch.ones(len(real), device=fabric.device)
            fabric.backward(F.binary_cross_entropy(discriminator(real), ones))
            fake = generator(torch.randn(len(real), 6, 1, 1, device=fabric.device))
            fabric.backward(F.binary_cross_entropy(discriminator(fake.detach()), 0 * ones))
            optimizer_d.step()
            generator.zero_grad()
            loss = F.binary_cross_entropy(discriminator(fake), ones)
            fabric.backward(loss)
            optimizer_g.step()
    if fabric.is_global_zero:
        with torch.no_grad():
            torch.save(generator.module(fixed_noise), folder / "fake.pt")
    fabric.barrier()
    return float(fabric.all_reduce(loss.detach(), reduce_op="mean"))


def meta_learning(fabric: Any, folder: Path) -> float:
    """Learn weights from which one step fits a new task (MAML); tasks are divided between the ranks."""
    fabric.seed_everything(42)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    model, optimizer = fabric.setup(model, optim.Adam(model.parameters(), lr=1e-2))
    names = [name for name, _ in model.module.named_parameters()]
    for step in range(3):
        optimizer.zero_grad()
        meta_loss = torch.zeros(())
        for task in range(2):
            generator = torch.Generator().manual_seed(100 * step + 2 * fabric.global_rank + task)
            amplitude, x = torch.rand((), generator=generator), torch.randn(10, 1, generator=generator)
            support, query = (x[:5], amplitude * x[:5].sin()), (x[5:], amplitude * x[5:].sin())
            weights = dict(model.module.named_parameters())
            loss = F.mse_loss(torch.func.functional_call(model.module, weights, support[0]), support[1])
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            fast = {name: weights[name] - 0.1 * grad for name, grad in zip(names, grads, strict=True)}
            meta_loss = meta_loss + F.mse_loss(torch.func.functional_call(model.module, fast, query[0]), query[1])
        fabric.backward(meta_loss / 2)
        optimizer.step()
    return float(fabric.all_reduce(meta_loss.detach(), reduce_op="mean"))


class Agent(nn.Module):
    """An actor and a critic."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    def get_action_and_value(self, x: Tensor, action: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        chances = torch.distributions.Categorical(logits=self.actor(x))
        action = chances.sample() if action is None else action
        return action, chances.log_prob(action), chances.entropy(), self.critic(x)[:, 0]

    def get_value(self, x: Tensor) -> Tensor:
        return self.critic(x)[:, 0]

    def forward(self, x: Tensor, action: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.get_action_and_value(x, action)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        _, logprob, entropy, value = self(batch["obs"], batch["actions"])
        ratio = (logprob - batch["logprobs"]).exp()
        advantages = batch["advantages"]
        policy = -torch.min(advantages * ratio, advantages * ratio.clamp(0.8, 1.2)).mean()
        return policy - 0.01 * entropy.mean() + 0.5 * F.mse_loss(value, batch["returns"])


def reinforcement_learning(fabric: Any, folder: Path) -> float:
    """PPO: every rank plays games of its own; the data of all is gathered and divided into batches."""
    fabric.seed_everything(42 + fabric.global_rank)
    agent = Agent()
    agent, optimizer = fabric.setup(agent, optim.Adam(agent.parameters(), lr=1e-2, eps=1e-5))
    for method in ("get_action_and_value", "get_value", "training_step"):
        agent.mark_forward_method(method)
    place = torch.randn(4, 2, device=fabric.device)
    for update in range(2):
        steps: dict[str, list[Tensor]] = {name: [] for name in ("obs", "actions", "logprobs", "values", "rewards")}
        for _ in range(8):
            with torch.no_grad():
                action, logprob, _, value = agent.get_action_and_value(place)
            reward = -place.abs().sum(1)
            for name, item in zip(steps, (place, action, logprob, value, reward), strict=True):
                steps[name].append(item)
            place = place + 0.1 * (2.0 * action[:, None] - 1) * torch.tensor([1.0, 0.0])
        with torch.no_grad():
            returns = [agent.get_value(place)]
        for reward in steps["rewards"][::-1]:
            returns.insert(0, reward + 0.9 * returns[0])
        data = {name: torch.cat(items) for name, items in steps.items()}
        data["returns"] = torch.cat(returns[:-1])
        data["advantages"] = data["returns"] - data["values"]
        gathered = {name: item.flatten(0, 1) if item.dim() > data[name].dim() else item
                    for name, item in fabric.all_gather(data).items()}  # fmt: skip
        indices = list(range(len(gathered["obs"])))
        sampler = DistributedSampler(
            indices, num_replicas=fabric.world_size, rank=fabric.global_rank, shuffle=True, seed=update
        )
        for ids in BatchSampler(sampler, batch_size=16 // fabric.world_size, drop_last=False):
            loss = agent.training_step({name: item[ids] for name, item in gathered.items()})
            optimizer.zero_grad(set_to_none=True)
            fabric.backward(loss)
            fabric.clip_gradients(agent, optimizer, max_norm=0.5)
            optimizer.step()
    return float(fabric.all_reduce(loss.detach(), reduce_op="mean"))


class Tokens(Dataset[tuple[Tensor, Tensor]]):
    """Sequences that count upwards, and each token's successor."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        line = (torch.arange(9) * (1 + index % 2) + index) % 32
        return line[:-1], line[1:]


class Block(nn.Module):
    """Attention and a feed-forward part."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.w1, self.w2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = self.norm1(x)
        # -1 heads: under tensor parallelism a rank has a part of them.
        q, k, v = (
            w(h).view(batch, length, -1, x.size(-1) // self.heads).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(attended.transpose(1, 2).reshape(batch, length, -1))
        return x + self.w2(F.gelu(self.w1(self.norm2(x))))


class Transformer(nn.Module):
    """A language model."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(32, width)
        self.places = nn.Embedding(8, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, 32, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.size(1), device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def language_model(fabric: Any, folder: Path) -> float:
    """Train a transformer, validate it after each epoch, and resume from its checkpoint."""
    seed_everything(42)
    train, val, test = random_split(Tokens(), [24, 8, 8], torch.Generator().manual_seed(0))
    train, val, test = fabric.setup_dataloaders(
        DataLoader(train, 4, shuffle=True), DataLoader(val, 4), DataLoader(test, 4)
    )
    model = Transformer()
    model, optimizer = fabric.setup(model, optim.AdamW(model.parameters(), lr=1e-2))
    state = AttributeDict(model=model, optimizer=optimizer, step=0)

    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    for _ in range(2):
        model.train()
        for batch in train:
            fabric.backward(step(batch))
            fabric.clip_gradients(model, optimizer, max_norm=0.25)
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
        model.eval()
        with torch.no_grad():
            losses = fabric.all_reduce(torch.stack([step(batch) for batch in val]).mean())
        fabric.print(f"perplexity {math.exp(losses):.2f}")
    fabric.save(folder / "lm.ckpt", state, filter={"optimizer": lambda name, value: True})
    fabric.barrier()
    reached, state.step = state.step, 0
    fabric.load(folder / "lm.ckpt", state)
    assert state.step == reached
    with torch.no_grad():
        return float(fabric.all_reduce(torch.stack([step(batch) for batch in test]).mean(), reduce_op="mean"))


def parallelize(model: Any, mesh: Any) -> Any:
    """Split each block over the ranks of ``mesh["tensor_parallel"]``."""
    tensor = mesh["tensor_parallel"]
    for layer in model.layers:
        plan = dict.fromkeys(("wq", "wk", "wv", "w1"), ColwiseParallel()) | dict.fromkeys(
            ("wo", "w2"), RowwiseParallel()
        )
        parallelize_module(layer, tensor, plan)
    output = ColwiseParallel(input_layouts=Replicate(), output_layouts=Shard(-1), use_local_output=False)
    return parallelize_module(model, tensor, {"output": output})


def tensor_parallel(fabric: Any, folder: Path) -> float:
    """Train a transformer whose layers are split over ranks, and save it."""
    fabric.seed_everything(0)
    with fabric.init_module(empty_init=True):
        model = Transformer()
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(optim.AdamW(model.parameters(), lr=1e-2, foreach=True))
    loader = fabric.setup_dataloaders(DataLoader(Tokens(), batch_size=8))
    for inputs, labels in loader:
        output = model(inputs)
        with loss_parallel():
            loss = F.cross_entropy(output.reshape(-1, output.size(-1)), labels.reshape(-1))
            fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    mesh = fabric.strategy.device_mesh
    assert mesh["tensor_parallel"].size() * mesh["data_parallel"].size() == fabric.world_size
    fabric.save(folder / "tp.ckpt", {"model": model, "optimizer": optimizer})
    full = loss.full_tensor() if hasattr(loss, "full_tensor") else loss
    return full.item()


EXAMPLES: dict[Callable[[Any, Path], float], Callable[[], dict[str, Any]]] = {
    image_classifier: dict,
    kfold: dict,
    active_learning: dict,
    dcgan: dict,
    meta_learning: dict,
    reinforcement_learning: dict,
    language_model: dict,
    tensor_parallel: lambda: {"strategy": ModelParallelStrategy(parallelize, data_parallel_size=1)},
}


def make(example: Callable[[Any, Path], float], num_ranks: int) -> Any:
    """Return the `Fabric` of an example."""
    return Fabric(accelerator="cpu", devices=num_ranks, **EXAMPLES[example]())
