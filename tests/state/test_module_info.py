"""What checkpoint formats learn about the modules in a state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plugframe import Lite
from plugframe_builtins._shared.checkpoint_files import formats


@dataclass
class Settings:
    """A configuration with a value that JSON lacks."""

    width: int = 2
    dtype: torch.dtype = torch.float32
    names: tuple[str, ...] = ("a",)


class Tied(nn.Module):
    """A module with tied weights and a configuration."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("checkpoint", ["safetensors", "dcp"])
def test_a_format_sees_tied_names_and_configurations(tmp_path: Path, checkpoint: str) -> None:
    """`info` describes each module in the state by its key: the user's class, its configuration, its tied weights."""
    plain = {"width": 2, "dtype": "float32", "names": ["a"]}
    with Lite(accelerator="cpu", devices=1, checkpoint=checkpoint) as lite:
        tied = lite.setup(Tied(Settings()))
        compiled: Any = lite.setup(torch.compile(Tied({"width": 2}), backend="eager"))
        lite.save(tmp_path / "x", {"model": tied, "nets": {"b": nn.Linear(1, 1)}, "list": [compiled], "step": 1})
        about = formats.inspect(str(tmp_path / "x")).info["modules"]
    group = [["embed.weight", "head.weight"]]
    assert about == {
        "model": {"class": "Tied", "config": plain, "tied": group},
        "nets.b": {"class": "Linear", "config": None, "tied": []},
        "list.0": {"class": "Tied", "config": {"width": 2}, "tied": group},
    }


class Failing:
    """A configuration that cannot be read."""

    def to_dict(self) -> dict[str, Any]:
        raise RuntimeError("no")


@pytest.mark.parametrize("config", [Failing(), {"a": object()}, {"a": {1, 2}}, nn.Linear, 3, None])
def test_a_configuration_is_complete_or_left_out(tmp_path: Path, config: Any) -> None:
    """One that holds more than plain values is never recorded in part, and does not stop a save."""
    with Lite(accelerator="cpu", devices=1) as lite:
        lite.save(tmp_path / "x", {"model": Tied(config)})
    assert formats.inspect(str(tmp_path / "x")).info["modules"]["model"]["config"] is None
