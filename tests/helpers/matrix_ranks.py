"""What the ranks of the matrix do: train a small language model, save it, load it, and write down what came out."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from matrix_cells import EXACT, Cell, Passing, Training
from plugframe import Lite
from plugframe.errors import UsageError
from plugframe.hooks.world import World
from ranks import rank_store

STEPS = 10
#: After how many of them a checkpoint is saved for others to go on from.
SAVED_AFTER = 6

#: Samples of a step, and the size of its micro-batches: two unequal ones; 2 ranks share the last one unevenly, and one
#: of 4 ranks gets no sample of it.
SAMPLES, WINDOW = 11, 8

#: Some steps are clipped by it and some are not.
MAX_NORM = 0.6

#: Precisions that keep state in a dtype in which the squares of gradients vanish: Adam divides by zero there.
WITHOUT_SQUARES = ("16-true",)

VOCABULARY, LENGTH, WIDTH = 64, 8, 32


class Block(nn.Module):
    """Mixes what came before and transforms it, beside a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        before = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype).unsqueeze(1)
        out: Tensor = x + self.down(gelu(self.up(self.norm(x + before))))
        return out


class Model(nn.Module):
    """Predicts the next token: about 20 000 parameters, the head tied to the embedding."""

    tensor_parallel_plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.1)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def data() -> TensorDataset:
    """Return the samples of every step."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(VOCABULARY, (SAMPLES, LENGTH + 1), generator=generator)
    return TensorDataset(text[:, :-1], text[:, 1:])


def build(precision: str, seed: int = 1) -> tuple[Model, torch.optim.Optimizer, LRScheduler]:
    """Return a model with an optimizer of two parameter groups and a schedule."""
    torch.manual_seed(seed)
    model = Model()
    kinds: tuple[list[Tensor], list[Tensor]] = [], []
    for parameter in model.parameters():
        kinds[parameter.ndim < 2].append(parameter)
    groups = [{"params": kinds[0], "weight_decay": 0.1}, {"params": kinds[1], "lr": 8e-3, "weight_decay": 0.0}]
    # With foreach=, as is the default on GPUs; on a CPU it is quicker for parameters in parts.
    optimizer: torch.optim.Optimizer
    if precision in WITHOUT_SQUARES:
        optimizer = torch.optim.SGD([groups[0], {**groups[1], "lr": 0.1}], lr=0.2, momentum=0.9, foreach=True)
    else:
        # eps is larger than rounding: Adam would make a full step of a gradient that consists of rounding only.
        optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-6, foreach=True)
    return model, optimizer, CosineAnnealingLR(optimizer, STEPS)


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def train_plain(window: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Train in plain torch on one process, in micro-batches of `window`; return weights and norms."""
    model, optimizer, scheduler = build(EXACT)
    norms = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        for tokens, targets in DataLoader(data(), batch_size=window):
            (loss_of(model, tokens, targets) * (len(tokens) / SAMPLES)).backward()  # type: ignore[no-untyped-call]
        norms.append(
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], MAX_NORM)
        )
        optimizer.step()
        scheduler.step()
    return dict(model.state_dict()), norms


class Run:
    """A model in training under some strategy."""

    def __init__(self, lite: Lite, precision: str, *, seed: int = 1, window: int = WINDOW) -> None:
        model, optimizer, self.scheduler = build(precision, seed)
        self.lite, self.window = lite, window
        self.model, self.optimizer = lite.setup(model, optimizer)
        # Ranks may share batches: how many parts the samples are divided into is the strategy's affair.
        shards = 24 // len(lite.setup_dataloaders(DataLoader(range(24), batch_size=1)))  # type: ignore[arg-type]
        self.loader = lite.setup_dataloaders(DataLoader(data(), batch_size=window // shards))
        self.norms: list[Tensor] = []
        self.losses: list[Tensor] = []

    @property
    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {**parts, "step": len(self.losses)}

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def _step(self) -> None:
        lite, model = self.lite, self.model
        total = torch.zeros(())
        self.optimizer.zero_grad()
        for number, (tokens, targets) in enumerate(self.loader):
            share = min(self.window, SAMPLES - number * self.window) / SAMPLES
            with lite.no_backward_sync(model, enabled=number < len(self.loader) - 1):
                loss = loss_of(model, tokens, targets)
                lite.backward(loss * share)
            total += loss.detach() * share * lite.batch_weight
        norm = lite.clip_gradients(model, self.optimizer, max_norm=MAX_NORM)
        assert norm is not None
        self.optimizer.step()
        self.scheduler.step()
        self.norms.append(norm.detach().clone())
        self.losses.append(lite.all_reduce(total))

    def content(self, path: Path) -> dict[str, Any]:
        """Return all there is to it, by the way that is open to every user."""
        self.lite.save(path, self.state)
        return self.lite.load(path)


def checkpoint_of(cell: Training, folder: Path) -> Path:
    """Return where the cell leaves its checkpoint."""
    return folder / f"{cell.id}.saved"


def train(cell: Training, folder: Path) -> dict[str, Any]:
    """Train from the beginning; in the exact precision leave a checkpoint on the way."""
    kept = None
    with Lite(accelerator="cpu", strategy=cell.strategy, devices=cell.ranks, precision=cell.precision) as lite:
        run = Run(lite, cell.precision)
        run.train(SAVED_AFTER)
        if cell.precision == EXACT:
            path = checkpoint_of(cell, folder)
            lite.save(path, run.state)
            kept = lite.load(path)
        run.train(STEPS - SAVED_AFTER)
        content = run.content(folder / f"{cell.id}.end")
        return {"content": content, "kept": kept, "norms": run.norms, "losses": run.losses}


def go_on(cell: Passing, folder: Path) -> dict[str, Any]:
    """Load what another strategy saved, save it again, and train to the end."""
    with Lite(accelerator="cpu", strategy=cell.target, devices=cell.ranks, precision=EXACT) as lite:
        run = Run(lite, EXACT, seed=2)
        state = {**run.state, "step": -1}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"\d+ ranks? saved, \d+ load")
            lite.load(checkpoint_of(cell.saved_by, folder), state)
        lite.save(folder / f"{cell.id}.again", state)
        kept = lite.load(folder / f"{cell.id}.again")
        run.train(STEPS - SAVED_AFTER)
        content = run.content(folder / f"{cell.id}.end")
        return {"content": content, "kept": kept, "norms": run.norms, "losses": run.losses}


def run_cells(world: World, cells: Sequence[Cell], folder: Path) -> None:
    """Run cells one after the other and leave what came out of each in `folder`, up to the first that fails."""
    store = rank_store(timeout_s=600.0)
    for number, cell in enumerate(cells):
        outcome = _outcome(cell, folder)
        if world.global_rank:
            outcome = {key: value for key, value in outcome.items() if key not in ("content", "kept")}
        path = folder / f"{cell.id}.rank{world.global_rank}"
        draft = path.with_name(f"{path.name}.draft")
        torch.save(outcome, draft)
        draft.rename(path)  # a rank that is stopped leaves no half of it
        # All ranks stop at the first failure of any: they may be out of step, or not have been cleaned up.
        store.set(f"matrix/{number}/{world.global_rank}", "failed" if "failed" in outcome else "passed")
        if any(store.get(f"matrix/{number}/{rank}") != b"passed" for rank in range(world.world_size)):
            return


def _outcome(cell: Cell, folder: Path) -> dict[str, Any]:
    try:
        result = train(cell, folder) if isinstance(cell, Training) else go_on(cell, folder)
        assert not dist.is_initialized(), "a process group was left behind"
        return result
    except UsageError as error:
        return {"refused": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    except BaseException:  # noqa: BLE001 - reported as the cell's
        return {"failed": traceback.format_exc()}
