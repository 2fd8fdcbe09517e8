"""Train the models of `library_models` under strategies and precisions, and compare with plain torch on one process."""

from __future__ import annotations

import contextlib
import json
import os
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from library_models import LIBRARIES, SAMPLES, Library
from plugframe import Lite
from plugframe.errors import PlugframeError, RankLostError
from plugframe.hooks.world import World
from plugframe.testing.ranks import RanksFailed, rank_store, run_ranks

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
#: Under which every model is trained, and those of `Library.others`: what is asked for.
STRATEGIES: dict[str, dict[str, Any]] = {
    "single": {"strategy": "single"},
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "deepspeed_stage_2": {"strategy": "deepspeed_stage_2"},
    "deepspeed_stage_3": {"strategy": "deepspeed_stage_3"},
    "tensor_parallel": {"strategy": "tensor_parallel"},
    "context": {"strategy": "fsdp+context", "mesh": {"data": 1, "context": 2}},
    "pipeline": {"strategy": "pipeline"},
    "expert": {"strategy": "fsdp+expert", "mesh": {"data": 1, "expert": 2}},
}
USUAL = ("single", "ddp", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3")
#: Relative difference of losses, and difference of weights as a part of how far the run moves them.
TOLERANCES = {"32-true": (1e-5, 1e-4), "bf16-mixed": (1e-2, 0.1), "bf16-true": (2e-2, 0.25)}


@dataclass(frozen=True)
class Cell:
    """A model under a strategy in a precision."""

    name: str
    strategy: str
    precision: str

    @property
    def id(self) -> str:
        return f"{self.name}-{self.strategy}-{self.precision}".replace(" ", "_")

    @property
    def ranks(self) -> int:
        return 1 if self.strategy == "single" else 2


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        word: ``"equal"``, ``"warned"`` (not equal, and a warning says so), ``"refused"``, ``"WRONG"``, ``"failed"`` (an
            error that is not plugframe's own), or ``"lost"`` (the other rank failed).
        text: the differences, or the error.
        warned: warnings of plugframe.
    """

    word: str
    text: str = ""
    warned: tuple[str, ...] = ()


def library(name: str) -> Library:
    """Return the library of this name."""
    return next(each for each in LIBRARIES if each.name == name)


def cells_of(each: Library) -> list[Cell]:
    """Return all cells of a row."""
    return [Cell(each.name, strategy, precision) for strategy in (*USUAL, *each.others) for precision in PRECISIONS]


def build(each: Library) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer, equal on every rank."""
    torch.manual_seed(1)
    model = each.build().train()
    # Every gradient counts by its size: Adam would hide a factor, and follow the rounding of a gradient of zero.
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=each.lr, momentum=0.5)


def train_plain(each: Library, precision: str) -> tuple[list[float], dict[str, Tensor]]:
    """Train in plain torch on one process; return losses and weights."""
    model, optimizer = build(each)
    if precision == "bf16-true":
        model.to(torch.bfloat16)
    losses = []
    for batch in each.loader(each.data(), SAMPLES):
        if precision == "bf16-true":
            batch = _cast(batch)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = each.loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _cast(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(torch.bfloat16) if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {name: _cast(value) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [_cast(value) for value in batch]
    return batch.apply(_cast)  # of PyG


def train(cell: Cell) -> tuple[list[float], dict[str, Tensor]]:
    """Train under plugframe; return losses and weights."""
    each = library(cell.name)
    asked = STRATEGIES[cell.strategy]
    with Lite(accelerator="cpu", devices=cell.ranks, precision=cell.precision, **asked) as lite:
        model, optimizer = build(each)
        model, optimizer = lite.setup(model, optimizer)
        # Into how many shares the samples are divided is the strategy's affair.
        shares = 24 // len(lite.setup_dataloaders(each.loader(each.data()[:24], 1)))
        losses = []
        for batch in lite.setup_dataloaders(each.loader(each.data(), SAMPLES // shares)):
            optimizer.zero_grad()
            loss = each.loss_of(model, batch)
            lite.backward(loss)
            optimizer.step()
            losses.append(lite.all_reduce(loss.detach()).item())
        return losses, lite.state_dict(model, all_ranks=True)


def difference(cell: Cell, found: tuple[list[float], dict[str, Tensor]], folder: Path) -> str:
    """Return how losses and weights differ from those of plain torch, "" if they do not."""
    losses, weights, start = torch.load(folder / f"{cell.name}-{cell.precision}".replace(" ", "_"), weights_only=True)
    loss_limit, limit = TOLERANCES[cell.precision]
    texts = []
    if any(abs(a - b) > loss_limit * abs(b) for a, b in zip(found[0], losses, strict=True)):
        texts.append(f"losses {found[0]} instead of {losses}")
    if found[1].keys() != weights.keys():
        texts.append(f"other names: {sorted(found[1].keys() ^ weights.keys())}")
        return "; ".join(texts)
    moves = {name: (weights[name].double() - start[name].double()) for name in weights}
    # A bfloat16 weight that is rounded in the other direction.
    unit = 2.0**-8 if cell.precision == "bf16-true" else 0.0
    total = torch.stack([move.square().mean() for move in moves.values()]).mean().sqrt()
    for name, move in moves.items():
        apart = (found[1][name].double() - weights[name].double()).square().mean().sqrt()
        rounding = unit * weights[name].double().square().mean().sqrt()
        if not apart <= limit * (move.square().mean().sqrt() + 0.1 * total + rounding):
            texts.append(f"{name} is {apart:.2g} apart, moved by {move.square().mean().sqrt():.2g}")
    return "; ".join(texts[:4])


def write_references(each: Library, folder: Path) -> None:
    """Write what plain torch gives in each precision."""
    start = {name: tensor.clone() for name, tensor in build(each)[0].state_dict().items()}
    for precision in PRECISIONS:
        losses, weights = train_plain(each, precision)
        torch.save((losses, weights, start), folder / f"{each.name}-{precision}".replace(" ", "_"))


def run_cells(world: World, cells: Sequence[Cell], folder: Path) -> None:
    """Run cells one after the other, up to the first that leaves the ranks out of step; write each outcome."""
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(os.environ.get("TMPDIR", "/tmp"), "extensions"))
    store = rank_store(timeout_s=600.0)
    for cell in cells:
        outcome = _outcome(cell, folder)
        (folder / f"{cell.id}.{world.global_rank}.json").write_text(json.dumps(asdict(outcome)), encoding="utf-8")
        store.set(f"{cell.id}/{world.global_rank}", outcome.word)
        words = {store.get(f"{cell.id}/{rank}") for rank in range(world.world_size)}
        if words & {b"failed", b"lost"} or len(words) > 1:
            return


def _outcome(cell: Cell, folder: Path) -> Outcome:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        word, text = _trained(cell, folder)
    warned = tuple(str(each.message) for each in caught if "plugframe" in str(each.category.__module__))
    return Outcome(word, text, warned)


def _trained(cell: Cell, folder: Path) -> tuple[str, str]:
    try:
        found = train(cell)
        assert not dist.is_initialized(), "a process group was left behind"
    except RankLostError as error:
        return "lost", str(error)
    except PlugframeError as error:
        return "refused", f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: BLE001 - whatever it is, it is the outcome
        return "failed", traceback.format_exc()
    text = difference(cell, found, folder)
    return ("WRONG", text) if text else ("equal", "")


def outcomes(cells: Sequence[Cell], folder: Path, *, timeout_s: float = 300.0) -> dict[Cell, Outcome]:
    """Run cells in as few starts of ranks as their failures allow."""
    found: dict[Cell, Outcome] = {}
    for ranks in (1, 2):
        left = [cell for cell in cells if cell.ranks == ranks]
        while left:
            failure = ""
            try:
                run_ranks(ranks, run_cells, left, folder, timeout_s=timeout_s)
            except RanksFailed as error:
                failure = str(error)
            done = [cell for cell in left if (folder / f"{cell.id}.0.json").is_file()]
            for cell in done or left[:1]:
                found[cell] = _read(cell, folder, failure)
            left = left[max(len(done), 1) :]
    return found


def _read(cell: Cell, folder: Path, failure: str) -> Outcome:
    order = ("failed", "WRONG", "refused", "equal", "lost")
    every = []
    for rank in range(cell.ranks):
        with contextlib.suppress(FileNotFoundError):
            every.append(Outcome(**json.loads((folder / f"{cell.id}.{rank}.json").read_text(encoding="utf-8"))))
    if len(every) < cell.ranks:
        return Outcome("failed", failure or "a rank ended without an outcome")
    worst = min(every, key=lambda outcome: order.index(outcome.word))
    warned = next((each.warned[0] for each in every if each.warned), "")
    return Outcome("warned", warned) if worst.word == "WRONG" and warned else worst
