"""The schedule on two real ranks, named by the option `schedule` of the strategy `pipeline`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from plugframe import Lite
from plugframe.hooks.world import World
from plugframe.testing import run_ranks

#: Layers that are frozen: those of no stage, of the first, of the last, and one of each.
FROZEN: dict[str, tuple[int, ...]] = {"none": (), "first": (0, 1), "last": (2, 3), "some": (0, 3)}


class Net(nn.Module):
    """Four layers, two in each stage; returns its loss."""

    def __init__(self, frozen: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)))
        for number in frozen:
            self.layers[number].requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.layers(x), y)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return batches; the last two are cut into fewer micro-batches, and the last into fewer than there are stages."""
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(2, size, 4, generator=generator)) for size in (8, 8, 6, 1)]  # type: ignore[misc]


def train(net: Any, optimizer: Any, backward: Any, own: tuple[str, ...] = ("",)) -> dict[str, Any]:
    """Return the losses of every step, and the gradients of the parameters whose names start with one of `own`."""
    losses, gradients = [], []
    for x, y in batches():
        optimizer.zero_grad()
        loss = net(x, y)
        backward(loss)
        named = ((name, p.grad) for name, p in net.named_parameters() if name.startswith(own))
        gradients.append({name: gradient.clone() for name, gradient in named if gradient is not None})
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": losses, "gradients": gradients}


def on_two_ranks(world: World) -> dict[str, Any]:
    """Collect the results for all tests below, in a single start of the ranks."""
    results: dict[str, Any] = {}
    for name, frozen in FROZEN.items():
        with Lite(accelerator="cpu", devices=2, strategy="pipeline") as lite:
            lite.launch()
            net = Net(frozen)
            net, optimizer = lite.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
            own = tuple(f"layers.{2 * world.global_rank + number}." for number in range(2))
            results[name] = train(net, optimizer, lite.backward, own)
            if not frozen:
                # Of another size: strategy `pipeline` makes a new schedule, which it first compares with GPipe.
                x, y = torch.randn(2, 12, 4)
                results["order"] = recorded(lambda net=net, x=x, y=y: net(x, y))
    return results


def recorded(call: Callable[[], Any]) -> list[str]:
    """Return what this rank's stage computes: ``F0``, ``B0`` (inputs), ``W0`` (weights), ``BW0`` (both)."""
    order: list[str] = []

    def record(name: str, letters: Callable[[dict[str, Any]], str]) -> None:
        method = getattr(PipelineStage, name)

        def called(stage: Any, number: int, *args: Any, **kwargs: Any) -> Any:
            order.append(f"{letters(kwargs)}{number}")
            return method(stage, number, *args, **kwargs)

        patch.setattr(PipelineStage, name, called)

    with pytest.MonkeyPatch.context() as patch:
        record("forward_one_chunk", lambda kwargs: "F")
        record("backward_one_chunk", lambda kwargs: "BW" if kwargs.get("full_backward", True) else "B")
        record("backward_weight_one_chunk", lambda kwargs: "W")
        call()
    return order


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    """The results of both ranks."""
    options = {"SCHEDULE": "plugframe_pipeline_zb:ZeroBubbleH1", "MICRO_BATCHES": "4"}
    return run_ranks(2, on_two_ranks, env={f"PLUGFRAME_STRATEGY__{name}": value for name, value in options.items()})


@pytest.mark.parametrize("name", FROZEN)
def test_losses_and_gradients_are_those_of_one_process(results: list[dict[str, Any]], name: str) -> None:
    """Of every step, odd batches included; each rank has the gradients of its own stage."""
    net = Net(FROZEN[name])
    expected = train(net, torch.optim.SGD(net.parameters(), lr=0.1), Tensor.backward)
    close: dict[str, float] = {"rtol": 1e-5, "atol": 1e-6}
    for each in results:
        torch.testing.assert_close(each[name]["losses"], expected["losses"], **close)
    for step, wanted in enumerate(expected["gradients"]):
        first, last = (each[name]["gradients"][step] for each in results)
        torch.testing.assert_close({**first, **last}, wanted, **close)


def test_gradients_of_weights_are_computed_later(results: list[dict[str, Any]]) -> None:
    """Stage 1 sends the gradients of its inputs first; stage 0, for which nobody waits, postpones nothing."""
    assert results[0]["order"][-8:] == ["F0", "F1", "BW0", "F2", "BW1", "F3", "BW2", "BW3"]
    assert results[1]["order"][-12:] == ["F0", "B0", "F1", "B1", "F2", "W0", "B2", "F3", "W1", "B3", "W2", "W3"]
