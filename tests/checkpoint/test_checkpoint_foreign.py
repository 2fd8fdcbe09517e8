"""Files of torch.save are read, and none runs code unless trusted."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from checkpoint_trees import plugin, same
from plugframe.errors import CheckpointCorruptError, CheckpointError
from plugframe_builtins.safetensors_checkpoint import writer


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


class Built:
    """A harmless class, which still is code to import."""


def load(path: Path, trusted: bool = False) -> dict[str, Any]:
    return plugin().checkpoint_load(path=str(path), trusted=trusted, lazy=False)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("trusted", [False, True])
def test_a_torch_save_file_of_tensors_loads(tmp_path: Path, zipped: bool, trusted: bool) -> None:
    """Both formats of torch.save are read, onto the CPU."""
    state = {"w": torch.arange(3.0), "epoch": 2, "nested": [{"a": torch.tensor(True)}]}
    torch.save(state, tmp_path / "last.pt", _use_new_zipfile_serialization=zipped)
    assert same(load(tmp_path / "last.pt", trusted), state)


def test_trusting_a_torch_save_file_runs_its_code(tmp_path: Path) -> None:
    """Only an explicit trusted=True lets the file run code."""
    torch.save({"a": Payload(tmp_path / "ran")}, tmp_path / "last.pt")
    text = r"last\.pt is a torch.save file that holds code \(\w+\.mkdir\), .* run: pass trusted=True only if"
    with pytest.raises(CheckpointError, match=text):
        load(tmp_path / "last.pt")
    assert load(tmp_path / "last.pt", trusted=True) == {"a": None}
    assert (tmp_path / "ran").exists()


def test_what_is_no_state_in_a_torch_save_file_is_refused(tmp_path: Path) -> None:
    """A bare tensor, a truncated file and a missing class are errors that name the file."""
    path = tmp_path / "last.pt"
    torch.save(torch.ones(2), path)
    with pytest.raises(CheckpointError, match=r"holds a Tensor, not a dict: read it with torch\.load"):
        load(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointCorruptError, match=r"last\.pt is not a complete torch\.save file: .*zip"):
        load(path)
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointCorruptError, match=r"last\.pt is not a complete torch\.save file: "):
        load(path)
    buffer = io.BytesIO()
    torch.save({"a": Built()}, buffer)
    path.write_bytes(buffer.getvalue().replace(b"Built", b"Burnt"))
    with pytest.raises(CheckpointError, match=r"holds code \([\w.]*Burnt\)"):
        load(path)
    with pytest.raises(CheckpointCorruptError, match="Burnt"):
        load(path, trusted=True)


def zip_of(path: Path, names: list[str], payload: Payload) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, pickle.dumps({"a": payload}))


def tar_of(path: Path, payload: Payload) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(payload, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def npy_of(path: Path, payload: Payload) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([payload], dtype=object), allow_pickle=True)


def state_class(payload: Payload) -> Any:
    class Holder(dict):  # type: ignore[type-arg]
        def __reduce__(self) -> Any:
            return payload.__reduce__()

    return Holder(a=1)


WAYS: dict[str, Callable[[Path, Payload], object]] = {
    "torch.save": lambda path, code: torch.save({"a": code}, path),
    "torch.save, legacy": lambda path, code: torch.save({"a": code}, path, _use_new_zipfile_serialization=False),
    "torch.save, protocol 4": lambda path, code: torch.save({"a": code}, path, pickle_protocol=4),
    "torch.save, as a key": lambda path, code: torch.save({"a": {1: [(code,)]}}, path),
    "torch.save, as a mapping": lambda path, code: torch.save({"state_dict": state_class(code)}, path),
    "torch.save, not at the top": lambda path, code: torch.save([code], path),
    "pickle 0": lambda path, code: path.write_bytes(pickle.dumps({"a": code}, protocol=0)),
    "pickle 2": lambda path, code: path.write_bytes(pickle.dumps({"a": code}, protocol=2)),
    "pickle 5": lambda path, code: path.write_bytes(pickle.dumps({"a": code}, protocol=5)),
    "pickle after the legacy magic": lambda path, code: path.write_bytes(
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + pickle.dumps(code, protocol=2) * 4
    ),
    "gzip of a pickle": lambda path, code: path.write_bytes(gzip.compress(pickle.dumps(code))),
    "TorchScript": lambda path, code: zip_of(path, ["a/data.pkl", "a/constants.pkl", "a/code/__torch__.py"], code),
    "torch package": lambda path, code: zip_of(path, ["a/.data/extern_modules", "a/model.pkl"], code),
    "npz": lambda path, code: zip_of(path, ["a.npy"], code),
    "npy of objects": npy_of,
    "tar": tar_of,
    "Python": lambda path, code: path.write_text(f"import os\nos.mkdir({code.marker!r})\n"),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_code_in_a_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Code hidden in a file, in any of these ways and under any name, is refused and never run."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "ran"
    path = tmp_path / "last.safetensors"
    WAYS[way](path, Payload(marker))
    with pytest.raises(CheckpointError, match="last.safetensors"):
        load(path)
    assert not marker.exists()


def test_code_in_metadata_and_bytes_stays_data(tmp_path: Path) -> None:
    """A pickle in the metadata or the bytes of a safetensors file, or in a state, is data."""
    marker = tmp_path / "ran"
    code = pickle.dumps(Payload(marker))
    tensor = torch.frombuffer(bytearray(code), dtype=torch.uint8)
    save_file({"a": tensor}, str(tmp_path / "plain"), metadata={"a": code.hex(), "__reduce__": "os.mkdir"})
    plugin().checkpoint_save(path=str(tmp_path / "own"), state={"a": code, "b": tensor}, info={"a": code}, wait=True)
    assert bytes(load(tmp_path / "plain")["a"].tolist()) == code
    assert load(tmp_path / "own")["a"] == code
    assert not marker.exists()


@pytest.mark.parametrize(
    "entry",
    [
        '{"reduce":["os.mkdir",["MARK"]]}',
        '{"py/object":"os.mkdir"}',
        '{"__reduce__":"MARK"}',
        '{"dtype":"load"}',
        '{"dtype":"os"}',
        '{"bits":["__dict__","a"]}',
        "{\"float\":\"__import__('os').mkdir('MARK')\"}",
        '{"eval":"1"}',
    ],
)
def test_a_forged_structure_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    """A file of ours with correct checksums whose structure contains a call is corrupt."""
    marker = tmp_path / "ran"
    forged = ('{"dict":{"a":{"tensor":"a"},"b":' + entry + "}}").replace("MARK", str(marker))
    with monkeypatch.context() as patch:
        patch.setattr(writer, "dump_structure", lambda structure: forged.encode())
        plugin().checkpoint_save(path=str(tmp_path / "last.ckpt"), state={"a": torch.ones(1)}, info={}, wait=True)
    with pytest.raises(CheckpointCorruptError, match=r"last\.ckpt: its structure is not what was written"):
        load(tmp_path / "last.ckpt")
    assert not marker.exists()


def test_a_folder_of_files_with_pickled_metadata_is_refused(tmp_path: Path) -> None:
    """A sharded checkpoint of another tool with pickled metadata is read only if trusted."""
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"metadata is a pickle .* none of it was run: pass trusted=True"):
        load(tmp_path / "dcp")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointCorruptError, match=r"dcp is not a complete torch\.distributed\.checkpoint"):
        load(tmp_path / "dcp", trusted=True)
    assert (tmp_path / "ran").exists()
