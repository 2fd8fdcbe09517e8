"""Mixtures that cannot run divided over ranks, with the messages that refuse them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from expert_models import WIDTH, Expert, Loop, Model, Sorted, Stacked


class Chained(Loop):
    """Experts that get the outputs of others."""

    def forward(self, x: Tensor) -> Tensor:
        for expert in self.experts:
            x = expert(x)
        return x


class Several(Loop):
    """Experts with a second argument."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts[0](x, self.scores(x))
        return out


class Apart(Model):
    """An expert is called outside of the module that has it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        out: Tensor = self.leave(self.layers[0](x) + self.layers[1].mixture.experts[0](x))  # type: ignore[union-attr,index,operator]
        return out


class InPlace(Loop):
    """The mixture changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


class Normed(Expert):
    """An expert with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Tracked(Loop):
    """Experts with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Normed() for _ in range(5)])


class Counting(Expert):
    """An expert that counts its tokens."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return super().forward(x)


class Counted(Loop):
    """Experts that count."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Counting() for _ in range(5)])


class Pooled(Expert):
    """An expert with one output for all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(0)


class Pools(Loop):
    """Experts that mix tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Pooled() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.experts[0](x)
        return out


class Tied(Loop):
    """Experts that share a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.experts[1].up.weight = self.experts[0].up.weight  # type: ignore[union-attr]


class Pair(Loop):
    """Two lists of experts in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleDict()
        self.others = nn.ModuleList([Expert() for _ in range(2)])


class Flat(Stacked):
    """Stacked experts with a number for each."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class Scaled(Sorted):
    """A mixture of them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Flat()


def _nothing(forward: Any, exchange: Any, x: Tensor, counts: Tensor) -> Tensor:
    return x


def _some(forward: Any, exchange: Any, x: Tensor, counts: Tensor) -> Tensor:
    out: Tensor = exchange([x], forward)[0]
    return out


def _two_lists() -> Model:
    model = Model(Pair)
    model.expert_plan = {"layers.0.mixture.experts": "modules", "layers.0.mixture.others": "modules"}
    return model


class One(Loop):
    """One expert less than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Expert()])


WRONG: tuple[tuple[Callable[[], Model], str], ...] = (
    (lambda: Model(Chained), "'layers.0.mixture' called its experts otherwise when it ran a second time"),
    (lambda: Model(Several), "Expert 0 of 'layers.0.mixture.experts' was called with 2 arguments, Tensor, Tensor"),
    (Apart, "Expert 0 of 'layers.1.mixture.experts' was called outside of the forward of 'layers.1.mixture'"),
    (lambda: Model(InPlace), "The forward of 'layers.0.mixture' changes an argument in place"),
    (lambda: Model(Tracked), "BatchNorm1d '0.norm' of the experts 'layers.0.mixture.experts' keeps running statistics"),
    (lambda: Model(Counted), "'layers.0.mixture.experts' change their buffer 'seen' in a forward"),
    (lambda: Model(Pools), "An expert of 'layers.0.mixture.experts' got 1 rows and returned of shape"),
    (lambda: Model(Tied), "'layers.0.mixture.experts.0.up.weight' and .* are one parameter"),
    (_two_lists, "A Pair runs the lists of experts 'layers.0.mixture.experts' and 'layers.0.mixture.others'"),
    (lambda: Model(Scaled, "grouped"), r"first dimension, and one more at least, .*Flat.scale \(4,\)"),
    (lambda: Model(Sorted, _nothing), "The dispatch of the experts 'layers.0.mixture.experts' exchanged nothing"),
    (lambda: Model(Sorted, _some), "must exchange the rows of 4 experts once, and exchanges 1"),
)
