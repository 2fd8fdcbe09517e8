"""Runs drawn at random that are killed and go on: law 4 as a property, for the tests and for a longer record."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

import warm
from plugframe import Lite, PlugframeWarning
from plugframe.hooks.world import World
from plugframe.testing.ranks import RanksFailed, run_ranks
from processes import is_alive

FEATURES = 6

Settings = dict[str, Any]


def draw(seed: int) -> Settings:
    """Return the settings of one case."""
    rng = random.Random(seed)
    ranks = rng.choice([1, 2])
    workers = rng.choice([0, 0, 0, 2])
    strategy = rng.choice(["auto", "auto", "fsdp"])
    loader = rng.choice(["in order", "shuffled", "weighted", "batch sampler", "own sampler", "stream"])
    batch = rng.randint(1, 3)
    steps_per_epoch = rng.randint(3, 6)
    uneven = rng.randint(0, batch * ranks - 1) if loader not in ("batch sampler", "stream") else 0
    steps = 3 * steps_per_epoch
    settings = {
        "seed": seed,
        "ranks": ranks,
        "strategy": strategy,
        "precision": rng.choice(["32-true", "32-true", "bf16-mixed", "16-mixed", "bf16-true"]),
        "loader": loader,
        "workers": 0 if loader == "stream" else workers,
        "later workers": rng.choice([workers, 1]) if workers else 0,
        "batch": batch,
        "samples": steps_per_epoch * batch * ranks - uneven,
        "epochs": 3,
        "layers": [
            rng.choice(["linear", "dropout", "layer norm", "batch norm", "lstm"]) for _ in range(rng.randint(1, 4))
        ],
        "width": rng.choice([4, 8, 12]),
        "optimizer": rng.choice(["SGD", "AdamW", "Adam", "RMSprop", "Adagrad"]),
        "scheduler": rng.choice(["StepLR", "CosineAnnealingLR", "none"]),
        "accumulate": rng.randint(1, 3),
        "clip": rng.random() < 0.5,
        "save every": rng.randint(1, 4),
        "checkpoint": rng.choice(["safetensors", "dcp"]),
        "wait": True,
        "kills": sorted(rng.sample(range(1, steps - 2), rng.choice([1, 1, 2]))),
        "victims": rng.choice(["one rank", "all ranks"]),
    }
    settings["wait"] = settings["checkpoint"] != "dcp" or rng.random() < 0.5
    if settings["precision"] == "16-mixed":  # few CPUs train an LSTM in float16
        settings["layers"] = ["linear" if layer == "lstm" else layer for layer in settings["layers"]]
    if strategy == "fsdp" and uneven:
        settings["accumulate"] = 1  # its ranks must make the same number of forwards, whatever their last batches
    # A single rank has no launcher.
    settings["victims"] = "the launcher" if ranks == 2 and rng.random() < 0.2 else settings["victims"]
    return settings


class Noisy(Dataset[Tensor]):
    """Samples changed at random, which are noted in a file when they are read."""

    def __init__(self, number: int, noted: str) -> None:
        self.number, self.noted = number, noted

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Tensor:
        with open(self.noted, "a") as file:
            file.write(f"{index}\n")
        return sample(index)


def sample(index: int) -> Tensor:
    noise = 0.1 * torch.randn(FEATURES) + 0.1 * random.random() + 0.1 * float(numpy.random.rand())
    x = torch.full((FEATURES,), float(index)).cos() * torch.arange(1, FEATURES + 1) + noise
    return torch.cat([torch.tensor([float(index)]), x])


class Stream(IterableDataset[Tensor]):
    """A stream that knows where it is."""

    def __init__(self, number: int, noted: str) -> None:
        self.number, self.noted, self.position = number, noted, 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < self.number:
            index, self.position = self.position, self.position + 1
            with open(self.noted, "a") as file:
                file.write(f"{index}\n")
            yield sample(index)
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Drawn:
    """A sampler of the user's own, which draws from Python's generator."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[int]:
        left = list(range(self.number))
        while left:
            yield left.pop(random.randrange(len(left)))

    def __len__(self) -> int:
        return self.number


def loader_of(settings: Settings, noted: str, *, workers: int) -> DataLoader[Any]:
    number, size, kind = settings["samples"], settings["batch"], settings["loader"]
    if kind == "stream":
        return DataLoader(Stream(number, noted), batch_size=size)
    data = Noisy(number, noted)
    if kind == "batch sampler":
        return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), size, False), num_workers=workers)
    samplers = {
        "weighted": lambda: WeightedRandomSampler(torch.arange(1.0, number + 1), number),
        "own sampler": lambda: Drawn(number),
    }
    made: Any = samplers[kind]() if kind in samplers else None
    return DataLoader(data, batch_size=size, sampler=made, shuffle=kind == "shuffled" or None, num_workers=workers)


class Layer(nn.Module):
    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        makers: dict[str, Any] = {
            "linear": lambda: nn.Linear(width, width),
            "dropout": lambda: nn.Dropout(0.3),
            "layer norm": lambda: nn.LayerNorm(width),
            "batch norm": lambda: nn.BatchNorm1d(width),
            "lstm": lambda: nn.LSTM(width, width, batch_first=True),
        }
        self.inner = makers[kind]()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "lstm":
            out: Tensor = x + self.inner(x.unsqueeze(1))[0].squeeze(1)
            return out
        if self.kind == "batch norm" and len(x) == 1:
            return x + torch.tanh(self._of_one(x))
        return x + torch.tanh(self.inner(x))

    def _of_one(self, x: Tensor) -> Tensor:
        # torch refuses to train batch norm on a batch of one; its parameters take part all the same.
        self.inner.eval()
        out: Tensor = self.inner(x)
        self.inner.train()
        return out


class Model(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings["width"]
        self.enter = nn.Linear(FEATURES, width)
        self.layers = nn.ModuleList(Layer(kind, width) for kind in settings["layers"])
        self.leave = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.leave(x)
        return out


def run(world: World, settings: Settings, folder: str, attempt: int, kill_at: int | None) -> None:
    """Train to the end, or until killed; go on from the newest checkpoint. Everything is noted in `folder`."""
    rank = world.global_rank
    warnings.simplefilter("ignore", PlugframeWarning)  # of a checkpoint that was never finished, say
    workers = settings["later workers"] if attempt else settings["workers"]
    noted = os.path.join(folder, f"read-{rank}-{attempt}")
    Path(noted).touch()
    with Lite(
        accelerator="cpu",
        devices=world.local_world_size,
        strategy=settings["strategy"],
        precision=settings["precision"],
        checkpoint=settings["checkpoint"],
    ) as lite:
        lite.seed_everything(settings["seed"])
        with lite.init_module():
            model = Model(settings)
        optimizer = getattr(torch.optim, settings["optimizer"])(model.parameters(), lr=0.01)
        model, optimizer = lite.setup(model, optimizer)
        scheduler = _scheduler(settings, optimizer)
        loader = lite.setup_dataloaders(loader_of(settings, noted, workers=workers))
        state = {"model": model, "optimizer": optimizer, "epoch": 0, **({"scheduler": scheduler} if scheduler else {})}
        kept = lite.checkpoints(os.path.join(folder, "kept"), keep_last=2)
        kept.resume(state)
        step = kept.step
        _note(folder, rank, {"attempt": attempt, "from": step})
        for epoch in range(state["epoch"], settings["epochs"]):
            for number, batch in enumerate(loader):
                step += 1
                loss = _loss(lite, model, batch, settings["accumulate"])
                if settings["clip"]:
                    lite.clip_gradients(model, optimizer, max_norm=0.5)
                optimizer.step()
                optimizer.zero_grad()
                if scheduler is not None:
                    scheduler.step()
                _note(folder, rank, {"step": step, "loss": loss.hex(), "read": batch[:, 0].tolist()})
                if step % settings["save every"] == 0:
                    kept.save(step, {**state, "epoch": epoch}, wait=settings["wait"])
                if step == kill_at:
                    _die(settings, world)
                del number
        content = _end(lite, folder, model)
        _note(folder, rank, {"end": content, "drawn": torch.rand(1).item().hex()})


def _scheduler(settings: Settings, optimizer: Any) -> Any:
    if settings["scheduler"] == "StepLR":
        return torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.8)
    if settings["scheduler"] == "CosineAnnealingLR":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    return None


def _loss(lite: Lite, model: Any, batch: Tensor, accumulate: int) -> float:
    parts = batch.chunk(accumulate)
    total = 0.0
    for number, part in enumerate(parts, 1):
        x = part[:, 1:]
        with lite.no_backward_sync(model, enabled=number < len(parts)):
            loss = (model(x).squeeze(1).float() - x.sum(1)).square().mean() / len(parts)
            lite.backward(loss)
        total += loss.item()
    return total


def _end(lite: Lite, folder: str, model: Any) -> str:
    path = os.path.join(folder, "end")
    lite.save(path, {"model": model})
    digest = 0.0
    weights = lite.load(path)["model"]
    return json.dumps({name: value.double().sum().item().hex() for name, value in weights.items()} | {"": digest.hex()})


def _note(folder: str, rank: int, fact: dict[str, Any]) -> None:
    with open(os.path.join(folder, f"noted-{rank}.jsonl"), "a") as file:
        file.write(json.dumps(fact) + "\n")


def _die(settings: Settings, world: World) -> None:
    if settings["victims"] == "the launcher":
        if world.global_rank == 0:
            os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()  # the rank is ended by the death of its launcher, or hangs and is found
    if settings["victims"] == "all ranks" or world.global_rank == settings["seed"] % world.world_size:
        os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------------- in the process that watches


def check(seed: int, folder: Path) -> str:
    """Run a case through, uninterrupted and killed; return what differs, an empty string if nothing does."""
    settings = draw(seed)
    straight, killed = folder / "straight", folder / "killed"
    straight.mkdir(parents=True)
    killed.mkdir()
    _start(settings, straight, 0, None)
    for attempt, step in enumerate([*settings["kills"], None]):
        _start(settings, killed, attempt, step)
    problems = []
    for rank in range(settings["ranks"]):
        problems += _compare(rank, _read(straight, rank), _read(killed, rank), killed, settings)
    return "; ".join(problems)


def _start(settings: Settings, folder: Path, attempt: int, kill_at: int | None) -> None:
    if settings["victims"] == "the launcher" and kill_at is not None:
        _start_launcher(settings, folder, attempt, kill_at)
        return
    try:
        run_ranks(settings["ranks"], run, settings, str(folder), attempt, kill_at, timeout_s=120.0)
    except RanksFailed:
        if kill_at is None:
            raise
        return
    assert kill_at is None, "nobody was killed"


def _start_launcher(settings: Settings, folder: Path, attempt: int, kill_at: int) -> None:
    job = folder / f"job-{attempt}.json"
    job.write_text(json.dumps({"settings": settings, "folder": str(folder), "attempt": attempt, "kill_at": kill_at}))
    options = ["--accelerator=cpu", f"--devices={settings['ranks']}", f"--strategy={settings['strategy']}"]
    options += [f"--precision={settings['precision']}", f"--checkpoint={settings['checkpoint']}"]
    command = [sys.executable, "-m", "plugframe", "run", *options, str(Path(__file__)), str(job)]
    # A launcher that is killed leaves its folder to the next one. A short path: sockets of loader workers are below it.
    with (
        tempfile.TemporaryDirectory(prefix="pf-", ignore_cleanup_errors=True) as temporary,
        open(folder / f"said-{attempt}", "w") as said,  # not a pipe: ranks that were left behind would hold it open
    ):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": temporary}
        done = warm.run(command, env=environment, stdout=said, stderr=said, timeout=180, check=False)
    assert done.returncode == -signal.SIGKILL, (folder / f"said-{attempt}").read_text()
    pids = [int(path.name.rpartition("-")[2]) for path in folder.glob(f"pid-{attempt}-*")]
    deadline = time.monotonic() + 20.0
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "the death of the launcher left a rank running"
        time.sleep(0.05)


def _read(folder: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"noted-{rank}.jsonl").read_text().splitlines()]


def _compare(rank: int, straight: Any, killed: Any, folder: Path, settings: Settings) -> list[str]:
    """Compare step by step; and what the last attempt read with the batches it trained on."""
    problems = []
    expected = {fact["step"]: fact for fact in straight if "step" in fact}
    for fact in killed:
        if "step" in fact and fact != expected[fact["step"]]:
            problems.append(f"rank {rank}: step {fact['step']} is not that of the uninterrupted run")
            break
    if killed[-1] != straight[-1]:
        problems.append(f"rank {rank}: it ends with other weights, or draws another number then")
    begun = next(fact["from"] for fact in reversed(killed) if "from" in fact)
    steps = [step for step in expected if step > begun]
    trained = Counter(int(index) for step in steps for index in expected[step]["read"])
    read = Counter(int(line) for line in (folder / f"read-{rank}-{len(settings['kills'])}").read_text().split())
    # Of a stream that is divided every rank reads all.
    if read - trained and not (settings["loader"] == "stream" and settings["ranks"] > 1):
        again = sorted((read - trained).elements())
        problems.append(f"rank {rank}: went on from step {begun} and read besides what came then: {again}")
    return problems


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    environment = {name: int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    Path(job["folder"], f"pid-{job['attempt']}-{os.getpid()}").touch()
    world = World(
        global_rank=environment["RANK"],
        local_rank=environment["LOCAL_RANK"],
        world_size=environment["WORLD_SIZE"],
        local_world_size=environment["LOCAL_WORLD_SIZE"],
    )
    torch.set_num_threads(1)
    run(world, job["settings"], job["folder"], job["attempt"], job["kill_at"])
