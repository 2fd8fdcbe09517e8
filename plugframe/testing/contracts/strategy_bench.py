"""Train under a strategy on every rank, to compare with the same training in plain torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from plugframe.core.registry.registry import Registry
from plugframe.hooks.world import World
from plugframe.lite import Lite
from plugframe.testing.contracts.running import broken
from plugframe.testing.contracts.strategy_rules import STATE

SAMPLES, WINDOW, EPOCHS = 11, 4, 2
MAX_NORM = 0.1

Batch = tuple[Tensor, Tensor]


class Model(nn.Module):
    """A norm, two linear layers and a buffer: (n, 6) to (n, 2)."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm: nn.Module = nn.LayerNorm(6)
        self.enter = nn.Linear(6, 16)
        self.leave = nn.Linear(16, 2)
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.leave(torch.relu(self.enter(self.norm(x)))) * self.scale
        return out


@dataclass
class Settings:
    """The strategy under test, sent to the ranks.

    Attributes:
        spec: the name.
        options: constructor arguments.
        provides: capabilities of its descriptor.
        lite: arguments of `Lite`: accelerator, precision, and those of the suite.
        build: returns the model.
        loss: returns the loss of a model for inputs and targets, a 0-d tensor, the mean over samples.
        batch: returns inputs and targets of a number of samples and a seed, equal on all ranks.
        shares: whether ranks may read the same samples.
        tolerance: of a weight against plain torch's, relative to its change in training.
        folder: checkpoints, which a job with another number of ranks loads.
    """

    spec: str
    options: dict[str, Any]
    provides: tuple[str, ...]
    folder: str
    build: Callable[[], nn.Module] = Model
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = field(default_factory=lambda: loss_of)
    batch: Callable[[int, int], Batch] = field(default_factory=lambda: batch_of)
    shares: bool = False
    tolerance: float = 1e-4
    lite: dict[str, Any] = field(default_factory=dict)


class Bench:
    """One rank of the job that runs the checks; each check creates its own `Lite`."""

    def __init__(self, world: World, settings: Settings) -> None:
        self.world, self.settings = world, settings
        self.folder = Path(settings.folder)
        self.tolerance = settings.tolerance

    def strategy(self) -> Any:
        """Return the argument of ``Lite(strategy=)``: the name, or an object if there are options."""
        if not self.settings.options:
            return self.settings.spec
        registry = Registry.discover()
        return registry.make(registry.find("strategy", self.settings.spec), self.settings.options)

    @contextmanager
    def lite(self, *plugins: Any, strategy: Any = None) -> Iterator[Lite]:
        """Run a job under the strategy."""
        chosen = self.strategy() if strategy is None else strategy
        settings = {"devices": self.world.local_world_size, **self.settings.lite}
        with Lite(strategy=chosen, plugins=plugins, **settings) as lite:
            lite.launch()
            yield lite

    def model(self, seed: int = 1) -> nn.Module:
        """Return a model with the weights of `seed`."""
        torch.manual_seed(seed)
        return self.settings.build()

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a model."""
        return self.settings.loss(model, x, y)

    def batch(self, number: int, seed: int = 5) -> Batch:
        """Return samples, equal on all ranks."""
        return self.settings.batch(number, seed)

    def windows(self, size: int, number: int = SAMPLES) -> list[Batch]:
        """Return the samples in batches of `size`, as one process reads them."""
        x, y = self.batch(number)
        return [(x[start : start + size], y[start : start + size]) for start in range(0, number, size)]

    def loader(self, lite: Lite, size: int = WINDOW) -> Any:
        """Return a loader whose batches have `size` samples over all ranks."""
        _, count = lite._hooks.strategy_data_shard()
        return lite.setup_dataloaders(DataLoader(TensorDataset(*self.batch(SAMPLES)), batch_size=max(1, size // count)))

    def window(self, lite: Lite, size: int = WINDOW) -> int:
        """Return the number of samples in a batch of such a loader, over all ranks."""
        count = int(lite._hooks.strategy_data_shard()[1])
        return max(1, size // count) * count

    def share(self, lite: Lite, batch: Batch) -> Batch:
        """Return this rank's shard of a batch, on its device."""
        index, count = lite._hooks.strategy_data_shard()
        x, y = (tensor[index::count].to(lite.device) for tensor in batch)
        return x, y

    def weights(self, lite: Lite, model: nn.Module) -> dict[str, Tensor]:
        """Return the full weights, on the CPU. Every rank must call it."""
        mine = lite._hooks.strategy_module_state(module=model, sharded=False)
        full = {name: tensor.detach().cpu().clone() for name, tensor in mine.items()} if lite.is_global_zero else None
        found: dict[str, Tensor] = lite._hooks.collective_broadcast_object(obj=full, src=0, group=None)
        return found

    def compare(
        self, law: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], begun: nn.Module, what: str
    ) -> None:
        """Check that the weights moved as in plain torch."""
        if list(found) != list(expected):
            broken(STATE, f"the state has the keys {list(found)}, and the model's own are {list(expected)}")
        for name, value in begun.state_dict().items():
            moved = float((expected[name] - value).double().norm())
            apart = float((found[name].double() - expected[name].double()).norm())
            if not apart <= self.tolerance * max(moved, 1e-3):
                broken(
                    law,
                    f"{what}, {name} is {apart:.3g} from plain torch's, which moved it by {moved:.3g}; "
                    f"{self.tolerance:g} of that is allowed (tolerance= of the suite, for what rounds by design)",
                )


@contextmanager
def bench(world: World, settings: Settings) -> Iterator[Bench]:
    """Yield the bench of one job. Set up a model first: an UnsupportedError skips all checks."""
    made = Bench(world, settings)
    with made.lite() as lite:
        model = made.model()
        lite.setup(model, optimizer_of(model))
    yield made


def batch_of(number: int, seed: int = 5) -> Batch:
    """Return inputs (number, 6) and targets (number, 2), equal on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 6, generator=generator)
    return x, torch.stack([x.sum(1), x.prod(1)], 1)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error of the model's output, a 0-d tensor."""
    return nn.functional.mse_loss(model(x), y)


def optimizer_of(model: nn.Module, *, lr: float = 0.1, momentum: float = 0.9) -> torch.optim.Optimizer:
    """Return an SGD optimizer, whose steps are proportional to the gradients: a wrong scale shows."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=momentum)


def train(bench: Bench, lite: Lite, training: Mapping[str, Any], epochs: int) -> list[float]:
    """Train for some epochs, and return the loss of each step."""
    losses = []
    loader = bench.loader(lite)
    for _ in range(epochs):
        for x, y in loader:
            training["optimizer"].zero_grad()
            loss = bench.loss(training["model"], x, y)
            lite.backward(loss)
            training["optimizer"].step()
            training["scheduler"].step()
            losses.append(loss.item())
    return losses


def set_up_training(bench: Bench, lite: Lite, seed: int) -> dict[str, Any]:
    """Return a model, an optimizer and a scheduler, set up in `lite`."""
    model = bench.model(seed)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, eps=1e-4)
    model, optimizer = lite.setup(model, adam)
    return {"model": model, "optimizer": optimizer, "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)}


def load(lite: Lite, path: str, training: dict[str, Any]) -> None:
    """Load a checkpoint, without the warning that another number of ranks saved it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\d+ ranks? saved, \d+ load")
        lite.load(path, training)
