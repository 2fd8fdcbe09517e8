"""Models of the pipeline tests, and training them beside plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B
from torch.nn.functional import cross_entropy, dropout, mse_loss
from torch.utils.checkpoint import checkpoint

from plugframe import Lite
from plugframe.hooks.world import World
from plugframe_builtins.pipeline.strategy import Pipeline

VOCABULARY, LENGTH, WIDTH = 11, 5, 8


class Layers(nn.Module):
    """A chain of layers that returns its loss if it gets targets."""

    def __init__(self, num_layers: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(num_layers)))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        out: Tensor = self.layers(x)
        return out if y is None else mse_loss(out, y)


class Block(nn.Module):
    """A residual block that takes a mask beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mixed = (mask @ self.norm(x)) / mask.sum(1, keepdim=True)
        out: Tensor = x + self.down(nn.functional.gelu(self.up(mixed)))
        return out


class GPT(nn.Module):
    """A language model with a parameter and a buffer of its own, glue between its blocks, and a dict as its result."""

    mask: Tensor

    def __init__(self, num_blocks: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH).tril())
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Any:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.places[positions]
        for block in self.blocks:
            x = block(x, self.mask)
        logits = self.head(self.norm(x))
        if targets is None:
            return {"logits": logits, "last": logits[:, -1].argmax(-1), "name": "gpt"}
        return cross_entropy(logits.flatten(0, 1), targets.flatten())


class Checkpointed(Layers):
    """Recomputes its layers in backward."""

    reentrant = False

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x if y is None else mse_loss(x, y)


class Recurrent(nn.Module):
    """Recurrent layers keep weak references to their parameters, and a list of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.GRU(6, 6, batch_first=True) for _ in range(8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.unsqueeze(1).expand(-1, 3, -1)
        for layer in self.layers:
            x, _ = layer(x)
        return mse_loss(x[:, -1], y)


class Encoder(nn.Module):
    """Torch's own encoder reads parameters of its layers before it runs them."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(self.layers(x.unsqueeze(1).expand(-1, 3, -1)).mean(1), y)


class Summed(Layers):
    """Its loss is a sum over samples."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return (self.layers(x) - y).square().sum()


class Scored(Layers):
    """Returns its loss beside its outputs, and numbers that are no tensors."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        out = self.layers(x)
        return {"loss": mse_loss(out, y), "out": out, "width": out.shape[1], "positive": bool(x.sum() > -1e9)}


class Noisy(Layers):
    """Draws random numbers in every layer."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(dropout(x, 0.3, training=self.training))
        return x if y is None else mse_loss(x, y)


class Derived(torch.optim.SGD):
    """Steps as torch's own."""


class Sign(torch.optim.Optimizer):
    """Steps parameters one by one, those of other stages too."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                held = self.state[parameter]
                held.setdefault("mean", torch.zeros_like(parameter)).lerp_(parameter.grad, 0.5)
                parameter.add_(held["mean"].sign(), alpha=-group["lr"])


def build(cls: Callable[[], nn.Module] = Layers, seed: int = 1) -> Any:
    """Return a model with the weights of `seed`."""
    torch.manual_seed(seed)
    return cls()


def numbers(size: int = 8, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of `Layers`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator), torch.randn(size, 6, generator=generator)


def text(size: int = 8, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of `GPT`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (size, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def lite_of(world: World, strategy: Any, **settings: Any) -> Lite:
    """Return a `Lite` on the CPU of this rank."""
    return Lite(accelerator="cpu", devices=world.world_size, strategy=strategy, **settings)


@dataclass
class Twins:
    """A model under a strategy, and the same model in plain torch.

    Attributes:
        tolerance: of losses, norms and weights, relative and absolute.
    """

    lite: Lite
    model: Any
    plain: Any
    optimizers: Sequence[torch.optim.Optimizer]
    tolerance: float = 1e-5

    def step(self, loss_of: Callable[[Any], Tensor], *, micro: int = 2, max_norm: float | None = 0.1) -> None:
        """Make one step of both, of `micro` accumulated losses, and compare losses and norms."""
        ours, theirs = self.optimizers
        ours.zero_grad()
        theirs.zero_grad()
        for number in range(micro):
            with self.lite.no_backward_sync(self.model, enabled=number < micro - 1):
                loss = loss_of(self.model)
                self.lite.backward(loss / micro)
            expected = loss_of(self.plain)
            (expected / micro).backward()  # type: ignore[no-untyped-call]
            self.close(loss.detach(), expected.detach())
        if max_norm is not None:
            norm = self.lite.clip_gradients(self.model, ours, max_norm=max_norm)
            assert norm is not None
            held = [p for group in theirs.param_groups for p in group["params"]]
            self.close(norm, nn.utils.clip_grad_norm_(held, max_norm))
        ours.step()
        theirs.step()

    def compare(self) -> None:
        """Compare weights and optimizer states; every rank must call it."""
        found = self.lite.state_dict(self.model, all_ranks=True)
        expected = self.plain.state_dict()
        assert list(found) == list(expected)
        for name, value in expected.items():
            self.close(found[name], value, name)
        states = self.lite.state_dict(self.optimizers[0], all_ranks=True), self.optimizers[1].state_dict()
        assert states[0]["param_groups"] == states[1]["param_groups"]
        assert states[0]["state"].keys() == states[1]["state"].keys()
        for number, entry in states[1]["state"].items():
            assert entry.keys() == states[0]["state"][number].keys()
            for name, value in entry.items():
                self.close(states[0]["state"][number][name], value, f"{name} of {number}")

    def close(self, found: Tensor, expected: Tensor, what: str = "") -> None:
        """Compare two tensors."""
        torch.testing.assert_close(
            found, expected, rtol=self.tolerance, atol=self.tolerance, msg=lambda text: f"{what}: {text}"
        )


def twins(
    lite: Lite,
    cls: Callable[[], nn.Module] = Layers,
    *,
    groups: Callable[[nn.Module], Any] = lambda model: model.parameters(),
    tolerance: float = 1e-5,
    **options: Any,
) -> Twins:
    """Return a model that was set up, and its plain twin, each with an AdamW."""
    model = build(cls)
    plain = copy.deepcopy(model)
    # A larger eps: Adam would make a full step of a gradient that consists of rounding only.
    made = [torch.optim.AdamW(groups(each), lr=0.01, eps=1e-4, **options) for each in (model, plain)]
    lite.setup(model, made[0])
    return Twins(lite, model, plain, made, tolerance)


class Halved(Schedule1F1B):
    """Half of the gradients, on two micro-batches."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "scale_grads": True})


class Needy(Schedule1F1B):
    """Wants an argument of its own."""

    def __init__(self, *args: Any, must_have: int, **options: Any) -> None:
        super().__init__(*args, **options)


def pipelines(ranks: int) -> list[tuple[str, Pipeline]]:
    """Return a strategy for each schedule, with several stages a rank where the schedule runs them."""
    return [
        ("gpipe", Pipeline(schedule="gpipe", micro_batches=4)),
        ("1f1b", Pipeline(schedule="1f1b", micro_batches=8)),
        ("interleaved", Pipeline(schedule="interleaved", stages=2 * ranks, micro_batches=ranks)),
        ("zero_bubble", Pipeline(schedule="zero_bubble", micro_batches=ranks)),
        ("zero_bubble", Pipeline(schedule="zero_bubble", stages=2 * ranks, micro_batches=2 * ranks)),
        ("class", Pipeline(schedule="torch.distributed.pipelining:Schedule1F1B", micro_batches=4)),
        ("unset", Pipeline()),
    ]
