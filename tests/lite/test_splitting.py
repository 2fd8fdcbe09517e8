"""Data that a script splits, pads or skips itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from plugframe import Lite, OrderError, SettingError
from plugframe.lite.splitting import _part


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_parts_are_consecutive_and_complete(count: int) -> None:
    """The parts of lists, tensors and dicts follow each other; padding repeats the last item."""
    items = list("abcde")
    parts = [_part(items, index, count, False) for index in range(count)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    padded = [_part({"x": torch.arange(5), "y": tuple(items)}, index, count, True) for index in range(count)]
    assert {len(each[key]) for each in padded for key in "xy"} == {-(-5 // count)}
    assert padded[-1]["x"][-1] == 4
    assert padded[-1]["y"][-1] == "e"


def test_the_next_pass_leaves_out_batches() -> None:
    """It begins after the batches that were skipped, of the same order; the pass after it is complete."""
    order = []
    for skipped in (0, 2):
        with Lite(accelerator="cpu", devices=1) as lite:
            lite.seed_everything(3, verbose=False)
            loader = lite.setup_dataloaders(DataLoader(torch.arange(8), batch_size=2, shuffle=True))
            order.append([x.tolist() for x in lite.skip_first_batches(loader, skipped)])
            assert len(list(loader)) == 4
    assert order[1] == order[0][2:]
    with Lite(accelerator="cpu", devices=1) as lite:
        loader = lite.setup_dataloaders(DataLoader(torch.arange(8), batch_size=2))
        for number in (-1, True, 5):
            with pytest.raises(SettingError, match=r"skip_first_batches\("):
                lite.skip_first_batches(loader, number)
        with pytest.raises(OrderError, match="was not"):
            lite.skip_first_batches(DataLoader([1]), 1)
        lite.skip_first_batches(loader, 1)
        with pytest.raises(OrderError, match="position of a checkpoint already"):
            lite.skip_first_batches(loader, 1)


def test_wrong_data_are_refused() -> None:
    """Text, numbers and dicts of unequal lengths cannot be split."""
    with Lite(accelerator="cpu", devices=1) as lite:
        wrong: list[tuple[Any, str]] = [("text", "got str"), (3, "got int"), ({"a": [1], "b": []}, "different lengths")]
        for data, match in wrong:
            with pytest.raises(SettingError, match=match), lite.split_between_processes(data):
                pass
        assert lite.pad_across_processes({"a": torch.ones(2), "b": "x"})["b"] == "x"
        lite.free_memory()
