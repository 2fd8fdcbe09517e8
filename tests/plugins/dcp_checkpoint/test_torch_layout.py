"""dcp with layout="torch": one folder that torch's tools and plugframe read; and folders of torch itself."""

from __future__ import annotations

import collections
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from plugframe import CheckpointCorruptError, CheckpointError, Lite, SettingError
from plugframe_builtins._shared.checkpoint_files import torch_format
from plugframe_builtins._shared.checkpoint_files.torch_metadata import UnsafeMetadataError, read_metadata
from plugframe_builtins.dcp_checkpoint.checkpoint import ShardedCheckpoint

# torch warns that one process alone loads and saves.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


class Net(nn.Module):
    """Tied weights, and tensors of unusual kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 4)
        self.second.weight = self.first.weight
        self.register_buffer("complex", torch.randn(4, 2, dtype=torch.complex64))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("scalar", torch.tensor(3))
        self.register_buffer("narrow", torch.randn(4, 4).to(torch.float8_e4m3fnuz))
        self.register_buffer("rows", torch.randn(100, 4)[5:7])


@pytest.fixture
def lite() -> Iterator[Lite]:
    with Lite(accelerator="cpu", devices=1, checkpoint=ShardedCheckpoint(layout="torch")) as lite:
        yield lite


def trained(lite: Lite) -> dict[str, Any]:
    """Return a state of every kind of value, after a step."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    lite.setup(model, optimizer)
    lite.backward((model.first(torch.randn(2, 3)) * model.second(torch.randn(2, 3))).sum())
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "step": 3, "pair": (1, 2), "list": [1, torch.ones(2)]}


def same_values(one: nn.Module, other: dict[str, Any]) -> None:
    for name, value in one.state_dict().items():
        bits = [
            each.contiguous().view(torch.uint8) if each.numel() and each.dim() else each
            for each in (value, other[name])
        ]
        assert torch.equal(*bits), name


def test_torchs_tools_open_the_folder(lite: Lite, tmp_path: Path) -> None:
    """dcp.load fills a plain state_dict by its own names, and dcp_to_torch_save converts the folder."""
    state = trained(lite)
    lite.save(tmp_path / "x", state)
    plain = Net().state_dict()
    dcp.load({"model": plain}, checkpoint_id=tmp_path / "x")
    same_values(state["model"], plain)
    dcp_to_torch_save(tmp_path / "x", tmp_path / "x.pt")
    converted = torch.load(tmp_path / "x.pt", weights_only=True)
    same_values(state["model"], converted["model"])
    assert converted["step"] == 3
    assert converted["pair"] == (1, 2)
    assert set(converted["optimizer"]["state"]) == {"first.weight", "first.bias", "second.bias"}


def test_plugframe_loads_and_verifies_the_folder(lite: Lite, tmp_path: Path) -> None:
    """Every value and type comes back without torch's metadata; a flipped bit anywhere in a data file is found."""
    state = trained(lite)
    lite.save(tmp_path / "x", state)
    (tmp_path / "x" / ".metadata").unlink()
    model = Net()
    other = {**state, "model": model, "step": 0, "pair": 0, "optimizer": torch.optim.AdamW(model.parameters())}
    lite.load(tmp_path / "x", other)
    same_values(state["model"], model.state_dict())
    assert (other["step"], other["pair"]) == (3, (1, 2))
    (file,) = (tmp_path / "x").glob("*.distcp")
    content = file.read_bytes()
    for at in range(7, len(content), len(content) // 20):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(CheckpointCorruptError, match="not what was written"):
            lite.load(tmp_path / "x")


def test_one_layout_replaces_the_other(lite: Lite, tmp_path: Path) -> None:
    """A save over a checkpoint of the other layout, or over a file, leaves nothing of it behind."""
    torch.save({"a": 1}, tmp_path / "x")
    for layout, names in (("torch", {".metadata", ".distcp", ".json"}), ("plugframe", {".safetensors", ".json"})) * 2:
        with Lite(accelerator="cpu", devices=1, checkpoint=ShardedCheckpoint(layout=layout)) as own:
            own.save(tmp_path / "x", {"w": torch.ones(3), "layout": layout})
            found = {name if name.startswith(".") else os.path.splitext(name)[1] for name in os.listdir(tmp_path / "x")}
            assert found == names
            assert own.load(tmp_path / "x")["layout"] == layout


def test_names_that_torch_would_confuse_are_refused(lite: Lite, tmp_path: Path) -> None:
    """torch joins keys by dots: two that become equal are an error, and nothing is written."""
    with pytest.raises(CheckpointError, match=r"layout='torch' joins the keys .*duplicated flatten key a\.b"):
        lite.save(tmp_path / "x", {"a": {"b": 1}, "a.b": 2})
    assert not (tmp_path / "x").exists()
    with pytest.raises(SettingError, match="layout='zip' is not supported: use 'plugframe' or 'torch'"):
        ShardedCheckpoint(layout="zip")


def test_a_value_with_code_in_a_folder_of_torch_is_refused(tmp_path: Path) -> None:
    """The metadata of such a folder is harmless, the value is not: only trusted=True runs it."""
    dcp.save({"w": torch.ones(2), "code": collections.deque([1])}, checkpoint_id=tmp_path / "x")
    with pytest.raises(
        CheckpointError, match=r"can hold code \(in the value 'code'\); none of it was run: pass trusted"
    ):
        torch_format.read(str(tmp_path / "x"), trusted=False)
    assert torch_format.read(str(tmp_path / "x"), trusted=True)["code"] == collections.deque([1])


class Attack:
    """An object whose pickle is what it is given."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize(
    "attack",
    [
        Attack(os.mkdir, ("never",)),
        Attack(getattr, ("", "upper")),
        Attack(torch.load, ("never",)),
        Attack(nn.Linear, (1, 1)),
        Attack(collections.OrderedDict, ()),
    ],
)
def test_metadata_that_names_anything_else_is_refused(tmp_path: Path, attack: Attack) -> None:
    """Only the names of torch's metadata are admitted, and none is called or imported."""
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"a": attack}, storage_data={})))  # type: ignore[dict-item]
    with pytest.raises(UnsafeMetadataError):
        read_metadata(str(tmp_path / ".metadata"))
    assert not Path("never").exists()


@pytest.mark.parametrize("change", ["size", "chunk", "pipe"])
def test_metadata_that_lies_about_sizes_is_damaged(tmp_path: Path, change: str) -> None:
    """Tensors larger than the files, elements in no chunk, and a file that would block are found before reading."""
    dcp.save({"w": torch.ones(4)}, checkpoint_id=tmp_path / "x")
    metadata = pickle.loads((tmp_path / "x" / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["w"]
    if change == "pipe":
        (tmp_path / "x" / "__0_0.distcp").unlink()
        os.mkfifo(tmp_path / "x" / "__0_0.distcp")
    else:
        entry.size = torch.Size([2**50])
    if change == "size":
        entry.chunks[0].sizes = torch.Size([2**50])
    (tmp_path / "x" / ".metadata").write_bytes(pickle.dumps(metadata))
    text = {"size": "larger than its files", "chunk": "do not fill it exactly once", "pipe": "not a regular file"}[
        change
    ]
    with pytest.raises(CheckpointError, match=text):
        torch_format.read(str(tmp_path / "x"), trusted=False)


@pytest.mark.parametrize("poison", [b"\x80\x04Nr\xff\xff\xff\x7f.", b"\x80\x05\x96" + b"\xff" * 5 + b"\x00" * 3 + b"."])
def test_metadata_reserves_no_memory_for_nothing(tmp_path: Path, poison: bytes) -> None:
    """A pickle of a few bytes may ask for gigabytes."""
    (tmp_path / ".metadata").write_bytes(poison)
    with pytest.raises((UnsafeMetadataError, ValueError)):
        read_metadata(str(tmp_path / ".metadata"))


def test_metadata_cannot_change_torchs_classes(tmp_path: Path) -> None:
    """A pickle may set attributes of a class it names: it gets one of its own."""
    poisoned = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadataIndex\nN}X\x03\x00\x00\x00fqnK\x01s\x86b."
    (tmp_path / ".metadata").write_bytes(poisoned)
    with pytest.raises(TypeError, match="__setstate__"):
        read_metadata(str(tmp_path / ".metadata"))
    assert MetadataIndex("a").fqn == "a"
    assert "fqn" not in vars(MetadataIndex)


def test_a_file_outside_of_the_folder_is_never_read(tmp_path: Path) -> None:
    """A folder of torch whose metadata points elsewhere is damaged."""
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "x")
    metadata = pickle.loads((tmp_path / "x" / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../__0_0.distcp"
    (tmp_path / "x" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointCorruptError, match="is not a file of the folder"):
        torch_format.read(str(tmp_path / "x"), trusted=False)
