"""`from_pretrained` under `init_module(empty_init=True)`: weights are read at set-up, by each rank its own shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import plugframe_builtins.safetensors_checkpoint.deferred_reading as weight_files
from plugframe import CollectiveMismatchError, Lite, UnsupportedError, World
from plugframe.deferred.module import is_deferred
from ranks import run_ranks

SHAPE = (130, 64)


class Loaded(nn.Module):
    """A model that reads its weights as the loader of transformers does."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import safetensors

        with torch.device("meta"):
            self.embed = nn.Embedding(*SHAPE)
            self.head = nn.Linear(SHAPE[1], SHAPE[0], bias=False)
            self.block = nn.Linear(SHAPE[1], SHAPE[1])
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                owner, _, own = name.rpartition(".")
                value = file.get_slice(name)[...].to(device=None, dtype=torch.float32)
                setattr(self.get_submodule(owner), own, nn.Parameter(value))
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(self.embed(tokens)))
        return out


def write(path: Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Write weights in another dtype than the model's."""
    torch.manual_seed(seed)
    shapes = {"embed.weight": SHAPE, "block.weight": (64, 64), "block.bias": (64,)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, path)
    return {name: tensor.float() for name, tensor in tensors.items()}


def read_on_ranks(world: World, folder: Path) -> int:
    """Return how many elements of the file this rank read."""
    expected = write(folder / f"copy{world.global_rank}")
    numbers = []
    plain = weight_files._Stored.read

    def counted(self: Any, region: Any) -> Tensor:
        value = plain(self, region)
        numbers.append(value.numel())
        return value

    weight_files._Stored.read = counted  # type: ignore[method-assign]
    with Lite(accelerator="cpu", devices=2, strategy="fsdp") as lite:
        with lite.init_module(empty_init=True):
            model = Loaded(folder / f"copy{world.global_rank}")
        assert is_deferred(model.embed.weight)
        assert not numbers
        model = lite.setup(model)
        assert model.head.weight is model.embed.weight
        state = lite.state_dict(model, all_ranks=True)
        assert all(torch.equal(state[name], value) for name, value in expected.items())
        # Another file on rank 1: its shards would not go with those of rank 0.
        write(folder / "odd", seed=world.global_rank) if world.global_rank else write(folder / "even")
        with lite.init_module(empty_init=True):
            other = Loaded(folder / ("odd" if world.global_rank else "even"))
        with pytest.raises(CollectiveMismatchError, match=r"'embed.weight' .* read from a file with digest"):
            lite.setup(other)
    return sum(numbers)


def test_ranks_read_their_own_shards(tmp_path: Path) -> None:
    """Each rank reads its rows, a tied weight once; files that differ are refused."""
    numel = SHAPE[0] * SHAPE[1] + 64 * 64
    assert run_ranks(2, read_on_ranks, tmp_path) == [numel // 2, numel // 2]


def test_files_are_read_at_set_up(tmp_path: Path) -> None:
    """On one rank too; a file that was changed meanwhile is refused, and what opens files is put back."""
    import safetensors

    path = tmp_path / "weights"
    expected = write(path)
    with Lite(accelerator="cpu", devices=1) as lite:
        with lite.init_module(empty_init=True):
            model, late = Loaded(path), Loaded(path)
        assert safetensors.safe_open is safe_open
        assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
        model = lite.setup(model)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
        os.utime(path, (1, 1))
        with pytest.raises(UnsupportedError, match="was changed after from_pretrained"):
            lite.setup(late)
