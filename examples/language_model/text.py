"""Text data and loss plot, shared by train_torch.py and train_lite.py."""

from __future__ import annotations

import string
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

ALPHABET = string.printable
MODULES = ("argparse", "ast", "dataclasses", "enum", "functools", "inspect", "shutil", "subprocess", "typing")


def encode(text: str) -> Tensor:
    """Return the indices (characters,) of `text`; drop characters that are not in the alphabet."""
    index = {character: i for i, character in enumerate(ALPHABET)}
    return torch.tensor([index[character] for character in text if character in index])


def decode(indices: Tensor) -> str:
    """Return the text of the indices (characters,)."""
    return "".join(ALPHABET[i] for i in indices.tolist())


class SourceCode(Dataset[tuple[Tensor, Tensor]]):
    """Source code of the standard library, as characters (block,) and the characters after each of them (block,)."""

    def __init__(self, *, block: int, validation: bool) -> None:
        library = Path(sysconfig.get_path("stdlib"))
        texts = [encode((library / f"{name}.py").read_text(encoding="utf-8")) for name in MODULES]
        # The last 5 % of every module are the validation set.
        cuts = [len(text) * 19 // 20 for text in texts]
        self.text = torch.cat([t[c:] if validation else t[:c] for t, c in zip(texts, cuts, strict=True)])
        self.block = block

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.block

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.block
        return self.text[start : start + self.block], self.text[start + 1 : start + 1 + self.block]


def plot_losses(path: Path, training: Sequence[float], validation: Mapping[int, float]) -> None:
    """Plot the training loss of every step and the measured validation losses, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} not written: run pip install matplotlib", file=sys.stderr)
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(training) + 1), training, linewidth=0.7, label="training")
    axes.plot(list(validation), list(validation.values()), marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss per character")
    axes.legend()
    figure.savefig(path, dpi=120)
