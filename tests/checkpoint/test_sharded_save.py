"""`write_shards`: a format of one's own that writes what each rank holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from plugframe.checkpoint import Piece, join, write_shards
from plugframe.errors import CheckpointCorruptError, CheckpointError
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins.single.one_rank import OneRank
from plugframe_builtins.torch_collective.collective import TorchCollective
from ranks import hooks_of, run_checks


class Format:
    """A format of torch.save files: one of each rank, and an index of rank 0."""

    def __init__(self, context: Context, folder: str) -> None:
        self.context = context
        self.folder = folder

    def save(self, state: dict[str, Any]) -> None:
        write_shards(self.context, self.folder, state, write=self.write, commit=self.commit)

    def write(self, pieces: dict[str, Piece]) -> dict[str, int]:
        rows = {name: (piece.offsets, piece.shape, piece.tensor) for name, piece in pieces.items()}
        torch.save(rows, os.path.join(self.folder, f"{self.context.world.global_rank}.pt"))
        return {name: piece.tensor.nbytes for name, piece in pieces.items()}

    def commit(self, structure: Any, written: list[dict[str, int]]) -> None:
        torch.save((structure, written), os.path.join(self.folder, "index.pt"))

    def load(self) -> tuple[Any, list[dict[str, int]]]:
        structure, written = torch.load(os.path.join(self.folder, "index.pt"))
        tensors: dict[str, Any] = {}
        for rank in range(len(written)):
            for name, (offsets, shape, part) in torch.load(os.path.join(self.folder, f"{rank}.pt")).items():
                full = tensors.setdefault(name, torch.full(shape, -1, dtype=part.dtype))
                full[tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))] = part
        return join(tensors, structure), written


@contextmanager
def job(folder: str, world: World) -> Iterator[Format]:
    """Make the format on two gloo ranks."""
    dist.init_process_group("gloo")
    collective = TorchCollective()
    context = Context(world=world, device=torch.device("cpu"), hooks=hooks_of(collective), names={})
    collective.collective_setup(context=context)
    try:
        yield Format(context, folder)
    finally:
        collective.collective_teardown()
        dist.destroy_process_group()


def state_of(rank: int, *, spread: bool) -> dict[str, Any]:
    rows = torch.arange(14.0).reshape(7, 2)
    if spread:
        rows = distribute_tensor(rows, init_device_mesh("cpu", (2,)), [Shard(0)], src_data_rank=None)
    large = {name: torch.full((200, 100), 3.0) for name in ("one", "two")}
    return {"rows": rows, "twin": rows, **large, "differs": torch.tensor(rank), "step": [rank]}


def every_value_is_written_once(on: Format) -> None:
    """Shards by their ranks, large replicas spread over the ranks, and rank 0's where values differ."""
    on.save(state_of(on.context.world.global_rank, spread=True))
    state, written = on.load()
    expected = state_of(0, spread=False)
    assert all(torch.equal(state[name], expected[name]) for name in ("rows", "twin", "one", "two", "differs"))
    assert state["step"] == [0]
    assert sum(map(sum, (each.values() for each in written))) == 56 + 2 * 80_000 + 8
    assert {"one", "two"} == {name for each in written for name in each if name in ("one", "two")}
    assert all("one" in each or "two" in each for each in written)


def an_error_is_raised_on_all_ranks(on: Format) -> None:
    """Whichever rank fails, and wherever: all raise the same class and message, and nothing hangs."""
    rank = on.context.world.global_rank

    def failing(error: Exception, at: int) -> Callable[..., Any]:
        def fail(*_: Any) -> Any:
            if rank == at:
                raise error
            return {}

        return fail

    for error, at, kind, text in [
        (ValueError("a  b."), 1, CheckpointError, r"cannot write .* \(rank 1\): ValueError: a b\."),
        (CheckpointCorruptError("broken"), 0, CheckpointCorruptError, "^broken$"),
    ]:
        with pytest.raises(kind, match=text):
            write_shards(on.context, on.folder, {"a": 1}, write=failing(error, at), commit=on.commit)
    with pytest.raises(CheckpointError, match=r"\(rank 0\): OSError: full"):
        write_shards(on.context, on.folder, {"a": 1}, write=on.write, commit=failing(OSError("full"), 0))
    with pytest.raises(CheckpointError, match=r"state\['a'\] is a set"):
        on.save({"a": {1} if rank else 1})


def test_two_ranks(tmp_path: Path) -> None:
    """The rules of the checks hold on two gloo ranks."""
    report = run_checks(2, partial(job, str(tmp_path)), [every_value_is_written_once, an_error_is_raised_on_all_ranks])
    assert not any(report.values()), "\n".join(report.values())


def test_one_rank_needs_no_group(tmp_path: Path) -> None:
    """A single rank writes everything."""
    context = Context(world=World(), device=torch.device("cpu"), hooks=hooks_of(OneRank()), names={})
    own = Format(context, str(tmp_path))
    own.save(state_of(0, spread=False))
    assert torch.equal(own.load()[0]["rows"], state_of(0, spread=False)["rows"])
