"""The blocks of docs/loop-lines.md compute what plain torch does, on one rank and on two, in the lines it counts."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from loop_blocks import LIBRARIES, rows, run_block, table
from plugframe.hooks.world import World
from ranks import run_ranks

BLOCKS = {name: blocks for name, blocks in rows().items() if name}
#: A row that starts ranks itself.
NOTEBOOK = "A notebook"


def plugframe_block(name: str) -> str:
    """Return the block with plugframe of a row; where wandb is not installed, with another logger."""
    block = BLOCKS[name][LIBRARIES.index("plugframe")]
    return block if importlib.util.find_spec("wandb") else block.replace('"wandb"', '"csv"')


def on_ranks(world: World, folder: Path) -> dict[str, Any]:
    """Run every block with plugframe."""
    os.environ["WANDB_MODE"] = "offline"
    found = {}
    for number, name in enumerate(BLOCKS):
        if name != NOTEBOOK:
            found[name] = run_block("plugframe", plugframe_block(name), world.world_size, folder / f"{number}")
    return found


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLUGFRAME_ACCELERATOR", "cpu")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the blocks of plain torch compute."""
    before, folder = os.getcwd(), tmp_path_factory.mktemp("raw")
    try:
        return {name: run_block("raw", blocks[0], 1, folder) for name, blocks in BLOCKS.items()}
    finally:
        os.chdir(before)


def assert_same(found: dict[str, Any], plain: dict[str, Any]) -> None:
    """Compare the results of blocks."""
    for name, result in found.items():
        if result is not None:
            torch.testing.assert_close(result, plain[name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_table_counts_the_marked_lines() -> None:
    """Each cell begins with the number of marked lines of its block, and plugframe needs at most as many as others."""
    counted = {name.lower(): [str(block.count("  # +\n")) for block in blocks[1:]] for name, blocks in BLOCKS.items()}
    assert {name: [cell.partition(",")[0] for cell in cells] for name, cells in table().items()} == counted
    assert all(int(ours) <= min(map(int, others)) for ours, *others in counted.values())


def test_a_line_without_a_mark_is_raw_code() -> None:
    """Every other line is in the raw block of its row, or in the loop that the library's rows begin with."""
    begin = rows()[""]
    for name, blocks in BLOCKS.items():
        for number, library in enumerate(LIBRARIES[1:], 1):
            known = {line.strip() for block in (blocks[0], begin[0], begin[number]) for line in block.splitlines()}
            lines = [line for line in blocks[number].splitlines() if line and not line.endswith("  # +")]
            assert [line for line in lines if line.strip() not in known] == [], f"{name}, {library}"


def test_one_rank(plain: dict[str, Any], tmp_path: Path) -> None:
    """On one rank the blocks compute what plain torch does."""
    assert_same(on_ranks(World(), tmp_path), plain)


@pytest.mark.ranks
def test_two_ranks(plain: dict[str, Any], tmp_path: Path) -> None:
    """On two ranks too, and both have the same results."""
    first, second = run_ranks(2, on_ranks, tmp_path)
    assert_same(first, plain)
    assert_same(second, plain)


@pytest.mark.ranks
def test_a_function_on_two_ranks(plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line for a notebook starts two ranks and returns the result."""
    monkeypatch.setenv("PLUGFRAME_LAUNCHER", "fork")
    assert_same({NOTEBOOK: run_block("plugframe", plugframe_block(NOTEBOOK), 2, tmp_path)}, plain)
