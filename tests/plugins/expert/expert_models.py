"""Mixtures of experts as users write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH, LENGTH, CHOSEN = 6, 4, 2


class Expert(nn.Module):
    """A network for tokens of shape (n, width)."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 5), nn.Linear(5, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


class Loop(nn.Module):
    """A loop over all experts, which get the tokens that choose them; expert 4 is chosen by none."""

    skips = False

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 5)
        self.experts = nn.ModuleList([Expert() for _ in range(5)])
        self.register_buffer("load", torch.zeros(5), persistent=False)
        self.runs: list[int] = []

    def scores(self, x: Tensor) -> Tensor:
        """Return the weight of each expert for each token."""
        out: Tensor = self.router(x).softmax(-1)
        return out * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.scores(tokens).topk(CHOSEN, -1)
        with torch.no_grad():
            self.load += chosen.flatten().bincount(minlength=5)
            self.runs.append(len(tokens))
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            if self.skips and not len(token):
                continue
            out.index_add_(0, token, (expert(tokens[token]) * weights[token, slot, None]).to(out.dtype))
        return out.view_as(x)


class Skipping(Loop):
    """A loop that calls experts with tokens only."""

    skips = True


class Dense(Loop):
    """Every expert gets all tokens, with whole sequences as rows."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.scores(x)
        return sum((self.experts[i](x) * weights[..., i : i + 1] for i in range(5)), torch.zeros_like(x))


class Stacked(nn.Module):
    """The weights of all experts, for tokens sorted by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, WIDTH, 5) * 0.4)
        self.down = nn.Parameter(torch.randn(4, 5, WIDTH) * 0.4)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        parts = zip(torch.split(x, counts.tolist()), self.up, self.down, strict=True)
        return torch.cat([torch.tanh(part @ up) @ down for part, up, down in parts])


class Sorted(nn.Module):
    """Tokens sorted by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 4), Stacked()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weight, chosen = self.router(tokens).softmax(-1).topk(CHOSEN, -1)
        order = chosen.flatten().argsort(stable=True)
        token = order // CHOSEN
        found = self.experts(tokens[token], chosen.flatten().bincount(minlength=4))
        out = torch.zeros_like(tokens).index_add(0, token, (found * weight.flatten()[order, None]).to(tokens.dtype))
        return out.view_as(x)


class Batches(Stacked):
    """Tokens of shape (experts, capacity, width)."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.tanh(x @ self.up) @ self.down


class Capacity(nn.Module):
    """Each expert takes one token of a sequence, the first that chooses it; the others are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 4), Batches()

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        chosen = nn.functional.one_hot(scores.argmax(-1), 4)
        taken = (chosen * (chosen.cumsum(1) == 1)).to(x.dtype)  # (n, length, experts)
        sent = torch.einsum("nle,nlw->enw", taken, x)
        weights = (taken * scores).to(x.dtype)
        out: Tensor = torch.einsum("nle,enw->nlw", weights, self.experts(sent).to(x.dtype))
        return out


class Layer(nn.Module):
    """A mixture with a residual connection."""

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixture = nn.LayerNorm(WIDTH), mixture

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mixture(self.norm(x))
        return out


class Attending(Layer):
    """Attention before the mixture."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x[:, None]
        return super().forward(x + nn.functional.scaled_dot_product_attention(heads, heads, heads)[:, 0])


class Wide(Layer):
    """Two linear layers before the mixture, which a tensor plan splits."""

    def __init__(self, mixture: nn.Module) -> None:
        super().__init__(mixture)
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.down(torch.tanh(self.up(x))))


class Model(nn.Module):
    """Two layers with a mixture between two linear ones."""

    def __init__(self, mixture: Any = Loop, plan: Any = None, layer: Any = Layer) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)
        self.layers = nn.ModuleList([layer(mixture()), layer(mixture())])
        if plan is not None:
            self.expert_plan = {"layers.*.mixture.experts": plan}

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.leave(x)
        return out


def data(number: int = 16) -> Tensor:
    """Return inputs of shape (number, length, 4)."""
    return torch.randn(number, LENGTH, 4, generator=torch.Generator().manual_seed(2))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Return a mean over samples."""
    return (model(x) - 1).square().mean()
