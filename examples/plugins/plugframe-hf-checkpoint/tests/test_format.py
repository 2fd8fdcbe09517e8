"""The format: what from_pretrained finds, and what plugframe resumes from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plugframe_hf_checkpoint.checkpoint import HuggingFaceCheckpoint
from safetensors.torch import load_file
from torch import nn

from plugframe import CheckpointCorruptError, CheckpointError, Lite, PlugframeWarning


class Net(nn.Module):
    """A model with tied weights and a configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.config: Any = SimpleNamespace(to_dict=lambda: {"model_type": "net", "dtype": torch.float32})
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


def job(**options: Any) -> Lite:
    return Lite(accelerator="cpu", devices=1, checkpoint=HuggingFaceCheckpoint(**options))


def test_the_folder_has_the_layout_of_save_pretrained(tmp_path: Path) -> None:
    """A configuration, files of at most the asked size, an index of every tensor, and tied weights once."""
    model = Net()
    with job(shard_gb=50e-9) as lite:
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        lite.save(tmp_path / "x", {"model": model, "optimizer": optimizer, "step": 3})
        other = Net()
        state: dict[str, Any] = {"model": other, "optimizer": torch.optim.SGD(other.parameters(), lr=0.2), "step": 0}
        lite.load(tmp_path / "x", state)
    assert json.loads((tmp_path / "x/config.json").read_text()) == {
        "architectures": ["Net"],
        "model_type": "net",
        "dtype": "float32",
    }
    weights = json.loads((tmp_path / "x/model.safetensors.index.json").read_text())["weight_map"]
    assert set(weights) == {"first.weight", "first.bias", "second.bias"}
    assert all(name in load_file(tmp_path / "x" / file) for name, file in weights.items())
    assert torch.equal(other.second.weight, model.first.weight)
    assert state["step"] == 3


def test_a_model_of_transformers_comes_back(tmp_path: Path) -> None:
    """from_pretrained reads what plugframe saved, and plugframe what save_pretrained wrote."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    with job() as lite:
        lite.save(tmp_path / "ours", {"model": model, "step": 1})
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        model.save_pretrained(tmp_path / "theirs")
        fresh = transformers.GPT2LMHeadModel(config)
        with pytest.warns(PlugframeWarning, match="holds no state of a run"):
            lite.load(tmp_path / "theirs", {"model": fresh}, strict=False)
        assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


def test_what_is_missing_or_foreign_is_told(tmp_path: Path) -> None:
    """A model without configuration is a warning; a folder of something else is never replaced or read."""
    with job() as lite:
        with pytest.warns(PlugframeWarning, match="has no config.json: Linear has no `config` of plain values"):
            lite.save(tmp_path / "x", {"model": nn.Linear(1, 1)})
        (tmp_path / "folder").mkdir()
        with pytest.raises(CheckpointError, match="is no folder of such a checkpoint: give another path"):
            lite.save(tmp_path / "folder", {"model": Net()})
        with pytest.raises(
            CheckpointError, match=r"is not a checkpoint of Hugging Face: it has neither plugframe_run.json"
        ):
            lite.load(tmp_path / "folder")
        lite.save(tmp_path / "x", {"model": Net()})
        (tmp_path / "x/config.json").write_text("{}")
        with pytest.raises(CheckpointCorruptError, match=r"config.json is not what was written: expected"):
            lite.load(tmp_path / "x")
