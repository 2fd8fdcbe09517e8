"""The blocks of docs/loop-lines.md, by row and library, and what they run on."""

from __future__ import annotations

import os
import re
import resource
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from paths import DOCS
from plugframe import Lite

PAGE = DOCS / "loop-lines.md"
#: As the page names them, in the order of its blocks.
LIBRARIES = ("raw", "plugframe", "Accelerate", "Fabric")
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LITE = """\
lite = Lite()
model, optimizer = lite.setup(model, optimizer)
loader, test_loader = lite.setup_dataloaders(loader, test_loader)
"""


def rows() -> dict[str, tuple[str, ...]]:
    """Return the blocks of every row, in the order of `LIBRARIES`; those that rows begin with under ``""``."""
    intro, *sections = PAGE.read_text(encoding="utf-8").split("\n## ")
    found = {"": tuple(_BLOCK.findall(intro))}
    return found | {each.partition("\n")[0]: tuple(_BLOCK.findall(each)) for each in sections}


def table() -> dict[str, list[str]]:
    """Return the cells of the table, by row."""
    lines = PAGE.read_text(encoding="utf-8").split("<!-- table -->")[1].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {re.sub(r"\[(.*)\].*", r"\1", first).lower(): rest for first, *rest in cells}


class Bar:
    """What the blocks use of a ``tqdm`` bar."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Any:
        return iter(self._items)

    def set_postfix(self, **values: float) -> None:
        assert all(isinstance(value, float) for value in values.values())


def weights(module: nn.Module) -> list[float]:
    """Return the weights of a module."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).tolist()


def train(lite: Lite | None) -> list[float]:
    """Train as the blocks do, on some ranks."""
    names = prepared(1 if lite is None else lite.world_size)
    model, optimizer, loader = names["model"], names["optimizer"], names["loader"]
    if lite is not None:
        model, optimizer = lite.setup(model, optimizer)
        loader = lite.setup_dataloaders(loader)
    for x, y in loader:
        loss = names["loss_fn"](model(x), y)
        loss.backward() if lite is None else lite.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def prepared(num_ranks: int) -> dict[str, Any]:
    """Return the names that the blocks use."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(126, 4, generator=generator)
    y = (x[:, :3] + 0.5 * torch.randn(126, 3, generator=generator)).argmax(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    run = SimpleNamespace(log=lambda values: None, finish=lambda: None)
    return {
        "__name__": "__main__",
        "os": os,
        "torch": torch,
        "Lite": Lite,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.2),
        "loader": DataLoader(TensorDataset(x[:96], y[:96]), batch_size=8 // num_ranks),
        "test_loader": DataLoader(TensorDataset(x[96:], y[96:]), batch_size=8),
        "loss_fn": nn.CrossEntropyLoss(),
        "token_loss": nn.CrossEntropyLoss(reduction="none"),
        "weights": weights,
        "train": train,
        "tqdm": Bar,
        "wandb": SimpleNamespace(init=lambda **settings: run),
        "get_ema_multi_avg_fn": get_ema_multi_avg_fn,
        "peak_memory": lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def run_block(library: str, block: str, num_ranks: int, folder: Path) -> Any:
    """Run a block of plain torch or plugframe in this rank, in its own folder, and return its result."""
    names = prepared(num_ranks)
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    if library == "plugframe" and "Lite(" not in block:
        block = _LITE + block
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            exec(compile(block, f"{library} block", "exec"), names)
        finally:
            if "lite" in names:
                names["lite"].teardown()
    result = names.get("result")
    return result.item() if isinstance(result, torch.Tensor) else result
