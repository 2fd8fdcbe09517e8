"""The parts of a training step, and whole steps of many shapes, by hand and with plugframe: one process, a tiny model.

OMP_NUM_THREADS=1 python benchmarks/step_parts.py [--rounds 15] [--steps 300]

Each case is measured in interleaved rounds; whole steps must end with the same loss, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from plugframe import Lite, hookimpl
from plugframe.base import Extension
from plugframe.hooks import KINDS
from rounds import fitted, interleave, machine, report
from step import loop, make, make_loader, same_losses, timed

#: Every hook that a step calls.
HOOKS = {
    "strategy": ("strategy_next_batch", "strategy_backward", "strategy_optimizer_step"),
    "accelerator": ("accelerator_move_batch",),
    "precision": (
        "precision_convert_input",
        "precision_convert_output",
        "precision_forward_context",
        "precision_backward",
        "precision_finish_backward",
        "precision_optimizer_step",
    ),
}


class Everywhere(Extension):
    """Wraps every hook of a step, and listens to its notifications."""

    @hookimpl
    def on_backward(self, loss: torch.Tensor) -> None:
        """Do nothing."""

    @hookimpl
    def on_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing."""


def _wrap_all() -> None:
    for kind, names in HOOKS.items():
        for name in names:
            arguments = ", ".join(inspect.signature(getattr(KINDS[kind].spec, name)).parameters)
            namespace: dict[str, Any] = {}
            exec(f"def {name}({arguments}):\n    return (yield)\n", namespace)
            setattr(Everywhere, name, hookimpl(wrapper=True)(namespace[name]))


_wrap_all()


class Many(nn.Module):
    """A model with any number of parameter tensors; a call uses them all."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.full((8, 32), 0.1) for _ in range(number)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.stack(list(self.weights)).sum(0)


class Batches(Dataset[Any]):
    """The same batch again and again, in a container."""

    def __init__(self, steps: int, wrap: Callable[[torch.Tensor], Any]) -> None:
        self.steps, self.batch = steps, wrap(torch.randn(8, 32, generator=torch.Generator().manual_seed(1)))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Any:
        return self.batch


CONTAINERS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "tensor": (lambda x: x, lambda batch: batch),
    "tuple": (lambda x: (x, x), lambda batch: batch[0]),
    "dict of 50": (lambda x: {f"key{number}": x for number in range(50)}, lambda batch: batch["key0"]),
    "nested": (lambda x: {"a": [x, (x, {"b": x})], "c": "text"}, lambda batch: batch["a"][1][1]["b"]),
}


def identity(batch: Any) -> Any:
    return batch


def parts(steps: int) -> dict[str, dict[str, Callable[[], float]]]:
    """Return forward, backward, step, zero_grad and loader alone."""
    lite = Lite(accelerator="cpu", devices=1)
    mine, theirs = lite.setup(*make()), make()
    loaders = lite.setup_dataloaders(make_loader(steps)), make_loader(steps)
    x = torch.randn(8, 32)

    def spent(prepare: Callable[[], Any], call: Callable[[Any], object]) -> Callable[[], float]:
        def measure() -> float:
            total_s = 0.0
            for _ in range(steps):
                prepared = prepare()
                start_s = time.perf_counter()
                call(prepared)
                total_s += time.perf_counter() - start_s
            return total_s / steps * 1e6

        return measure

    def each(model: Any, optimizer: Any, loader: Any, backward: Callable[[Any], Any]) -> dict[str, Any]:
        def with_gradients() -> None:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)

        return {
            "forward": spent(lambda: None, lambda _: model(x)),
            "backward": spent(lambda: model(x).sum(), backward),
            "step": spent(with_gradients, lambda _: optimizer.step()),
            "zero_grad": spent(with_gradients, lambda _: optimizer.zero_grad()),
            "loader": timed(loader, lambda _: None, steps),
        }

    ours = each(*mine, loaders[0], lite.backward)
    by_hand = each(*theirs, loaders[1], torch.Tensor.backward)
    return {name: {"by hand": by_hand[name], "plugframe": ours[name]} for name in ours}


def whole(
    steps: int,
    *,
    model: Callable[[], tuple[nn.Module, torch.optim.Optimizer]] = make,
    container: str | None = None,
    precision: str = "32-true",
    extensions: int = 0,
) -> dict[str, Callable[[], float]]:
    """Return whole steps by hand and with plugframe."""
    wrap, take = CONTAINERS["tuple" if container is None else container]

    def loader() -> DataLoader[Any]:
        return DataLoader(Batches(steps, wrap), batch_size=None, collate_fn=identity)

    def over(loader: Any, model: Any, optimizer: Any, backward: Callable[[Any], Any], context: Any) -> Any:
        step = loop(model, optimizer, backward, context=context)
        return timed(loader, lambda batch: step(take(batch)), steps, whole=True, losses=step)

    mixed = precision == "bf16-mixed"
    context = (lambda: torch.autocast("cpu", dtype=torch.bfloat16)) if mixed else None
    lite = Lite(accelerator="cpu", devices=1, precision=precision, plugins=[Everywhere() for _ in range(extensions)])
    with contextlib.redirect_stderr(None):
        module, optimizer = lite.setup(*model())
        loaders = lite.setup_dataloaders(loader())
    return {
        "by hand": over(loader(), *model(), torch.Tensor.backward, context),
        "plugframe": over(loaders, module, optimizer, lite.backward, None),
    }


def many(number: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = Many(number)
    return module, torch.optim.SGD(module.parameters(), lr=1e-7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    for name, pair in parts(options.steps).items():
        report(f"The {name} alone", interleave(pair, rounds=options.rounds), unit="µs", base="by hand")
    cases: dict[str, dict[str, Any]] = {
        **{f"precision {name}": {"precision": name} for name in ("32-true", "bf16-mixed")},
        **{f"{number} extensions on every hook": {"extensions": number} for number in (0, 1, 3)},
        **{f"a batch that is a {name}": {"container": name} for name in CONTAINERS},
    }
    overheads: dict[str, float] = {}
    for name, arguments in cases.items():
        overheads[name] = compared(f"A step, {name}", whole(options.steps, **arguments), options.rounds)
    print(fitted("extensions", {number: overheads[f"{number} extensions on every hook"] for number in (0, 1, 3)}, "µs"))
    sizes = {
        number: compared(
            f"A step, {number} parameter tensors",
            whole(max(options.steps // max(number // 20, 1), 5), model=lambda number=number: many(number)),
            options.rounds,
        )
        for number in (1, 10, 100, 1000)
    }
    print(fitted("parameter tensors", sizes, "µs"))


def compared(title: str, pair: dict[str, Callable[[], float]], rounds: int) -> float:
    """Report a case, check that both ended with the same loss, and return the median overhead."""
    results = interleave(pair, rounds=rounds)
    same_losses(title, pair)
    return report(title, results, unit="µs", base="by hand")["plugframe"]


if __name__ == "__main__":
    main()
