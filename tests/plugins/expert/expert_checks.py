"""What the tests of expert parallelism share: jobs, and training compared with one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from expert_models import Model, data, loss_of
from plugframe import Lite
from plugframe.hooks.world import World
from plugframe_builtins.pipeline.stand_in import OtherParameter


def build(make: Callable[[], Any] = Model, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return make()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def ranks(world: World) -> Iterator[World]:
    torch.manual_seed(0)
    yield world


def lite_of(strategy: Any, mesh: Any = None, devices: int = 4, **settings: Any) -> Lite:
    return Lite(accelerator="cpu", devices=devices, strategy=strategy, mesh=mesh, **settings)


def shard_of(lite: Lite) -> tuple[int, int]:
    index, count = lite._hooks.strategy_data_shard()
    return index, count


def trains_alike(lite: Lite, make: Callable[[], Model], tolerance: float = 1e-5) -> tuple[Model, Model]:
    """Two steps with accumulation and clipping, and one process's; compare losses, gradients, norms and weights."""
    model, plain = build(make), build(make)
    optimizer, its = (torch.optim.AdamW(each.parameters(), lr=0.01) for each in (model, plain))
    lite.setup(model, optimizer)
    index, count = shard_of(lite)
    for part in (slice(0, 8), slice(8, 16)):
        optimizer.zero_grad()
        its.zero_grad()
        batch = data()[part]
        with lite.no_backward_sync(model):
            lite.backward(loss_of(model, batch[index::count]) * 0.5)
        loss = loss_of(model, batch[index::count])
        lite.backward(loss)
        expected = loss_of(plain, batch)
        (0.5 * loss_of(plain, batch) + expected).backward()
        torch.testing.assert_close(lite.all_reduce(loss.detach()), expected.detach(), rtol=tolerance, atol=tolerance)
        norm = lite.clip_gradients(model, optimizer, max_norm=0.3)
        true = nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        torch.testing.assert_close(norm, true, rtol=tolerance, atol=tolerance)
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            if isinstance(ours, OtherParameter):
                continue
            # An expert that no rank called has none, as in one process.
            assert (ours.grad is None) == (theirs.grad is None), name
            if ours.grad is not None and theirs.grad is not None:
                torch.testing.assert_close(whole(ours.grad), theirs.grad, rtol=tolerance, atol=tolerance)
        optimizer.step()
        its.step()
    model.eval()
    plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, data()), loss_of(plain, data()), rtol=tolerance, atol=tolerance)
    return model, plain
