"""Law 4: a run that is stopped and resumed ends bit for bit where the uninterrupted run ends."""

from __future__ import annotations

import importlib.util
import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from plugframe import Lite
from plugframe.hooks.world import World
from ranks import run_ranks

EPOCHS, SAMPLES, BATCH = 2, 22, 2
#: Batches of an epoch on that many ranks; the last one is uneven.
LENGTH = {1: 11, 2: 6}
STRATEGIES = ["auto", "fsdp", "deepspeed"] if importlib.util.find_spec("deepspeed") else ["auto", "fsdp"]
MOMENTS = ("first", "middle", "last")


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Samples with random noise from the generators of Python and torch."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.full((4,), float(index)).sin() + 0.1 * torch.randn(4) + 0.1 * random.random()
        return x, x.sum(0, keepdim=True)


class Model(nn.Module):
    """Blocks with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.3), nn.LayerNorm(8)) for _ in range(2)
        )
        self.leave = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.leave(x)
        return out


def train(world: World, settings: dict[str, Any], path: str, *, stop: int | None, resume: bool) -> Any:
    """Train to the end, or save after step `stop`; return the losses by step, and the weights at the end."""
    workers = settings["workers"]
    with Lite(accelerator="cpu", devices=world.world_size, strategy=settings["strategy"]) as lite:
        lite.seed_everything(99 if resume else 7)
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        model, optimizer = lite.setup(model, optimizer)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.7)
        loader = lite.setup_dataloaders(DataLoader(Augmented(), batch_size=BATCH, shuffle=True, num_workers=workers))
        state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": 0}
        if resume:
            lite.load(path, state)
        step, losses = state["step"], {}
        while step < EPOCHS * LENGTH[world.world_size]:
            for x, y in loader:
                step += 1
                optimizer.zero_grad()
                halves = list(zip(x.split(1), y.split(1), strict=True))
                for number, (part, wanted) in enumerate(halves, 1):
                    with lite.no_backward_sync(model, enabled=number < len(halves)):
                        loss = (model(part) - wanted).square().mean() / len(halves)
                        lite.backward(loss)
                lite.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                scheduler.step()
                losses[step] = loss.item()
                if step == stop:
                    lite.save(path, {**state, "step": step})
                    return losses
        lite.save(path + "-end", {"model": model})
        content = lite.load(path + "-end")["model"]
        return losses, {name: value.clone() for name, value in content.items()}, torch.rand(1).item()


def moments(num_ranks: int) -> dict[str, int]:
    """Return the step of the second epoch after which a run is stopped."""
    length = LENGTH[num_ranks]
    return {"first": length + 1, "middle": length + length // 2, "last": length}


def go_through(world: World, folder: str) -> dict[str, str]:
    """Run every setting on this number of ranks; return the differences by setting."""
    outcome = {}
    for strategy in STRATEGIES:
        for workers in (0, 2):
            settings = {"strategy": strategy, "workers": workers}
            straight = train(world, settings, os.path.join(folder, f"{strategy}-{workers}"), stop=None, resume=False)
            for moment, step in moments(world.world_size).items():
                path = os.path.join(folder, f"{strategy}-{workers}-{moment}")
                begun = train(world, settings, path, stop=step, resume=False)
                losses, weights, drawn = train(world, settings, path, stop=None, resume=True)
                odd = [n for n, loss in {**begun, **losses}.items() if loss != straight[0][n]]
                odd_weights = [name for name, value in weights.items() if not torch.equal(value, straight[1][name])]
                text = f"losses of steps {odd}, weights {odd_weights}, drawn {drawn == straight[2]}"
                same = not odd and not odd_weights and drawn == straight[2] and min(losses) == step + 1
                outcome[f"{strategy}-{workers}-{moment}"] = "" if same else text
    return outcome


@pytest.fixture(scope="module", params=[1, 2])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    results: list[dict[str, str]] = run_ranks(
        request.param, go_through, str(tmp_path_factory.mktemp("law4")), timeout_s=280.0
    )
    return {name: "; ".join(filter(None, (result[name] for result in results))) for name in results[0]}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_ends_where_the_other_does(
    outcome: dict[str, str], strategy: str, workers: int, moment: str
) -> None:
    """Losses and weights are equal with shuffling, augmentation, dropout, accumulation, clipping and a scheduler."""
    assert not outcome[f"{strategy}-{workers}-{moment}"]
