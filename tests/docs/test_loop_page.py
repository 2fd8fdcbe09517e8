"""The blocks of docs/loop.md run as they are, on one rank and on several."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch

from paths import ROOT
from plugframe.hooks.world import World
from ranks import run_ranks

PAGE = (ROOT / "docs" / "loop.md").read_text(encoding="utf-8")


def run_page(world: World | None = None) -> dict[str, Any]:
    """Run the blocks one after another, and return the numbers they compute."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                exec(compile(block, f"docs/loop.md, block {number}", "exec"), names)
        return {"seen": names["seen"], "correct": int(names["correct"]), "losses": len(names["losses"])}
    finally:
        names["lite"].teardown()


@pytest.fixture
def _in_a_folder(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLUGFRAME_ACCELERATOR", "cpu")


@pytest.mark.usefixtures("_in_a_folder")
def test_the_blocks_run_on_one_rank() -> None:
    """Every block runs in one process."""
    found = run_page()
    assert found["seen"] == 70


@pytest.mark.usefixtures("_in_a_folder")
def test_the_blocks_run_on_two_ranks() -> None:
    """Every block runs on two ranks, and both compute the numbers of all samples."""
    first, second = run_ranks(2, run_page)
    assert first == second
    assert first["seen"] == 70
    assert first["losses"] == 9
