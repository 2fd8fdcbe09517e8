"""Batch normalisation over ranks on the CPU."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from plugframe.adopt.batch_norm import CpuSyncBatchNorm, tell_of_local_batch_norm, use_cpu_sync_batch_norm
from plugframe.hooks.world import World
from ranks import run_ranks


def _layer() -> nn.SyncBatchNorm:
    layer = nn.SyncBatchNorm(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    return layer


def _results(layer: nn.Module, x: Tensor, scale: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    (out * scale).sum().backward()
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None), *layer.buffers()]


def on_ranks(world: World) -> list[list[Tensor]]:
    """Normalise uneven shares of a batch, with the statistics followed by momentum and by count."""
    dist.init_process_group("gloo")
    x, scale = _batch()
    mine = slice(0, 5) if world.global_rank == 0 else slice(5, 8)
    found = []
    for momentum in (0.1, None):
        layer = _layer()
        layer.momentum = momentum
        use_cpu_sync_batch_norm(layer)
        found.append(_results(layer, x[mine], scale[mine]))
    dist.destroy_process_group()
    return found


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 2, generator=generator) + 1, torch.randn(8, 3, 2, generator=generator)


def test_ranks_normalise_over_their_common_batch() -> None:
    """Outputs, gradients and statistics are those of one process, for uneven shares too."""
    first, second = run_ranks(2, on_ranks)
    for number, momentum in enumerate((0.1, None)):
        layer = nn.BatchNorm1d(3, momentum=momentum)
        layer.load_state_dict(_layer().state_dict())
        out, grad, weight, bias, *buffers = _results(layer, *_batch())
        one, other = first[number], second[number]
        torch.testing.assert_close(torch.cat([one[0], other[0]]), out)
        torch.testing.assert_close(torch.cat([one[1], other[1]]), grad)
        torch.testing.assert_close([one[2] + other[2], one[3] + other[3]], [weight, bias])
        torch.testing.assert_close(one[4:], buffers)
        torch.testing.assert_close(other[4:], buffers)


def test_the_layer_is_torchs_own_again() -> None:
    """It is put back, and copies and pickles are plain."""
    layer = _layer()
    undo = use_cpu_sync_batch_norm(layer)
    assert type(layer) is CpuSyncBatchNorm
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is nn.SyncBatchNorm
        assert torch.equal(other.weight, layer.weight)
        assert other.process_group is None
    undo()
    assert type(layer) is nn.SyncBatchNorm


def test_a_local_normalisation_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """One that trains and is not synchronised is named; frozen and synchronised ones are not."""
    tell_of_local_batch_norm(nn.Sequential(_layer(), nn.BatchNorm1d(3).eval()))
    assert not caplog.text
    tell_of_local_batch_norm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    assert "BatchNorm1d '1' of Sequential normalises over the batch of each rank" in caplog.text
