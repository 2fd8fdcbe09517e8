"""Data, model and loss plot, shared by train_torch.py and train_lite.py."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset


def digits(num_test: int = 360) -> tuple[TensorDataset, TensorDataset]:
    """Return scikit-learn's 1797 handwritten digits, (1, 8, 8) each, as a training and a test set."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # -1 … 1
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    # A fixed seed: every run is tested on the same images.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:num_test], order[num_test:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def convnet() -> nn.Sequential:
    """Return a small network from images (batch, 1, 8, 8) to logits (batch, 10).

    It has no dropout and no batch norm, so its losses do not depend on the number of processes.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.GELU(),
        nn.Linear(64, 10),
    )


def progress(batches: Collection[Any], text: str, *, show: bool = True) -> Iterable[Any]:
    """Return the batches, with a progress bar if stdout is a terminal and rich is installed."""
    if not show or not sys.stdout.isatty() or not importlib.util.find_spec("rich"):
        return batches
    from rich.progress import track

    return track(batches, description=text, transient=True)


def write_losses(path: Path, losses: Sequence[float]) -> None:
    """Write the loss of every step as one line of JSON."""
    lines = (json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses, start=1))
    path.write_text("".join(lines), encoding="utf-8")


def plot_losses(path: Path, losses: Sequence[float]) -> None:
    """Plot the loss of every step, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} not written: run pip install matplotlib", file=sys.stderr)
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=1)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    figure.savefig(path, dpi=120)
