"""Code hidden anywhere in a checkpoint of any format is never run, however the checkpoint is read."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save as save_by_torch

from plugframe import Lite
from plugframe.checkpoint import digest, materialize, seal, split, unseal
from plugframe.cli import cli
from plugframe.errors import CheckpointError
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins._shared.checkpoint_files import sharded_format
from plugframe_builtins.dcp_checkpoint.checkpoint import ShardedCheckpoint
from plugframe_builtins.remote_checkpoint.checkpoint import RemoteCheckpoint
from plugframe_builtins.safetensors_checkpoint import writer
from plugframe_builtins.safetensors_checkpoint.checkpoint import SafetensorsCheckpoint
from plugframe_builtins.single.one_rank import OneRank
from ranks import hooks_of

PLUGINS: dict[str, Callable[[], Any]] = {
    "safetensors": SafetensorsCheckpoint,
    "dcp": ShardedCheckpoint,
    "remote": RemoteCheckpoint,
}
#: What the keeper of a run's checkpoints takes for one.
NAME = "step-000000000001.ckpt"
STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)

    @property
    def source(self) -> str:
        """The same as a Python module."""
        return f"import os\nos.makedirs({self.marker!r}, exist_ok=True)\n"


def made(make: Callable[[], Any]) -> Any:
    """Return a plugin, set up for one rank."""
    checkpoint = make()
    checkpoint.checkpoint_setup(
        context=Context(world=World(), device=torch.device("cpu"), hooks=hooks_of(OneRank()), names={})
    )
    return checkpoint


def file_of(path: Path, state: dict[str, Any] | None = None, info: dict[str, Any] | None = None) -> None:
    made(SafetensorsCheckpoint).checkpoint_save(path=str(path), state=state or STATE, info=info or {}, wait=True)


def folder_of(path: Path, state: dict[str, Any] | None = None, info: dict[str, Any] | None = None) -> Path:
    """Write a folder of ours; return its data file."""
    made(ShardedCheckpoint).checkpoint_save(path=str(path), state=state or STATE, info=info or {}, wait=True)
    (data,) = path.glob("*.safetensors")
    return data


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a folder's manifest, with a matching checksum."""
    manifest = path / sharded_format.MANIFEST
    body = json.loads(unseal(manifest.read_bytes(), where=""))
    manifest.write_bytes(seal(change(body) or body))


# ---------------------------------------------------------------------- the ways: files, and their URLs


def torch_zip(path: Path, code: Payload) -> None:
    torch.save({"state_dict": {"a": code}}, path)


def torch_legacy(path: Path, code: Payload) -> None:
    torch.save({"a": code}, path, _use_new_zipfile_serialization=False)


def raw_pickle(path: Path, code: Payload, protocol: int) -> None:
    path.write_bytes(pickle.dumps({"a": code}, protocol=protocol))


def torch_folder(path: Path, code: Payload) -> None:
    """A sharded checkpoint of torch, with pickles in place of its metadata and among its values."""
    path.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_by_torch({"a": torch.ones(2), "b": code}, checkpoint_id=str(path), no_dist=True)
    (path / ".metadata").write_bytes(pickle.dumps(code))


def pickled_shard(path: Path, code: Payload, how: str) -> None:
    """A folder whose data file became a pickle: of another length, of the same, or with matching checksums."""
    data = folder_of(path)
    content = pickle.dumps({"a": code})
    size = data.stat().st_size
    if how == "torch.save":
        torch_zip(data, code)
        return
    data.write_bytes(content if how == "short" else content.ljust(size, b"."))
    if how == "forged":
        whole = data.read_bytes()

        def fit(body: dict[str, Any]) -> None:
            body["files"][data.name][2] = digest(whole[: body["files"][data.name][1]])
            for _, _, chunks in body["tensors"].values():
                for chunk in chunks:
                    length = int(np.prod(chunk[1])) * 4
                    chunk[4] = [digest(whole[chunk[3] : chunk[3] + length])]

        rewrite(path, fit)


def pickled_manifest(path: Path, code: Payload) -> None:
    folder_of(path)
    (path / sharded_format.MANIFEST).write_bytes(pickle.dumps(code))


def side_files(path: Path, code: Payload) -> None:
    """A folder of ours with files that other tools execute by name."""
    folder_of(path)
    for name in ("conftest", "__init__", "__main__", "sitecustomize", "usercustomize", "torch", "plugframe", "hubconf"):
        (path / f"{name}.py").write_text(code.source)
    (path / "evil.pth").write_text(code.source.replace("\n", ";", 1))
    (path / "setup.cfg").write_text("[options.entry_points]\nplugframe.checkpoint =\n  evil = torch:mkdir\n")


def pickle_beside(path: Path, code: Payload) -> None:
    folder_of(path)
    for name in (".metadata", "data.pkl", "__0_0.distcp", "optimizer.pt"):
        (path / name).write_bytes(pickle.dumps(code))


REQUESTS = (
    '{"__reduce__":["os.mkdir",["MARK"]]}',
    '{"py/object":"os.mkdir","py/reduce":["MARK"]}',
    '{"py/reduce":[{"py/function":"os.mkdir"},{"py/tuple":["MARK"]}]}',
    '{"$type":"System.Diagnostics.Process","args":["MARK"]}',
    '{"!!python/object/apply:os.mkdir":["MARK"]}',
    '{"_target_":"os.mkdir","path":"MARK"}',
    "{\"dtype\":\"__import__('os').mkdir('MARK')\"}",
    "{\"eval\":\"__import__('os').mkdir('MARK')\"}",
)


def requests(code: Payload) -> list[Any]:
    """JSON that other readers interpret as a call."""
    return [json.loads(text.replace("MARK", code.marker)) for text in REQUESTS]


def call_in_structure(path: Path, code: Payload, number: int) -> None:
    """A folder whose structure contains a call, with correct checksums."""
    folder_of(path)
    rewrite(path, lambda body: body["structure"]["dict"].update(evil=requests(code)[number]))


def call_in_file(path: Path, code: Payload, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose structure contains a call, with correct checksums."""
    _, structure = split(STATE)
    structure["dict"]["evil"] = requests(code)[number]
    with monkeypatch.context() as patch:
        patch.setattr(writer, "dump_structure", lambda _: json.dumps(structure).encode())
        file_of(path)


def calls_as_values(path: Path, code: Payload, save: Callable[..., Any]) -> None:
    """A checkpoint with values and info that look like calls and pickles."""
    plain = {**STATE, "calls": requests(code), "pickle": pickle.dumps(code)}
    save(
        path, {**plain, "tensor": torch.frombuffer(bytearray(pickle.dumps(code)), dtype=torch.uint8)}, plain_info(code)
    )


def plain_info(code: Payload) -> dict[str, Any]:
    return {"calls": requests(code), "pickle": pickle.dumps(code), "step": 1, "metrics": {"loss": 1.0}}


def header_metadata(path: Path, code: Payload) -> None:
    """Another tool's safetensors file with code in its metadata."""
    told = {"__reduce__": json.dumps(requests(code)[0]), "pickle": pickle.dumps(code).hex(), "code": code.source}
    save_file(STATE, str(path), metadata=told)


def header_entries(path: Path, code: Payload) -> None:
    """A safetensors file whose header has code in place of dtypes and shapes."""
    evil = f"__import__('os').mkdir({code.marker!r})"
    slot = {"dtype": evil, "shape": [evil], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": {"format": evil}, "a": slot}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"abcd")


def object_array(path: Path, code: Payload, packed: bool) -> None:
    array = np.array([code], dtype=object)
    with path.open("wb") as file:
        (np.savez if packed else partial(np.save, allow_pickle=True))(file, array)


def tar_traversal(path: Path, code: Payload) -> None:
    """A tar archive with paths outside of the folder it is extracted to."""
    with tarfile.open(path, "w") as archive:
        for name in ("../escaped.py", str(Path(code.marker) / "x"), "pickle", "manifest.json"):
            info = tarfile.TarInfo(name)
            info.size = len(code.source)
            archive.addfile(info, io.BytesIO(code.source.encode()))


def zip_traversal(path: Path, code: Payload) -> None:
    """A zip archive like those of torch.save with paths outside of the folder it is extracted to."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a/data.pkl", "../escaped.py", f"{code.marker}/x", "a/../../escaped.py"):
            archive.writestr(name, pickle.dumps(code) if name.endswith("pkl") else code.source)


def torch_script(path: Path, code: Payload) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a/data.pkl", "a/constants.pkl", "a/code/__torch__.py"):
            archive.writestr(name, pickle.dumps(code) if name.endswith("pkl") else code.source)


def file_names(path: Path, code: Payload, name: str) -> None:
    """A folder whose manifest names a file outside of it."""
    data = folder_of(path)
    raw_pickle(path.parent / "evil.safetensors", code, 2)
    shutil.copy(data, path.parent / "0123456789abcdef-00000.safetensors")
    text = name.replace("OUT", str(path.parent))

    def change(body: dict[str, Any]) -> None:
        body["files"] = {text: body["files"][data.name]}

    rewrite(path, change)


def linked(path: Path, code: Payload, what: str) -> None:
    """A folder with a link to a pickle outside, or that is a link to another tool's."""
    away = path.parent / "away"
    if what == "folder":
        torch_folder(away, code)
        path.symlink_to(away)
        return
    data = folder_of(path)
    away.write_bytes(pickle.dumps(code).ljust(data.stat().st_size, b"."))
    victim = data if what == "data" else path / sharded_format.MANIFEST
    victim.unlink()
    victim.symlink_to(away)


def bomb(path: Path, _: Payload, how: str) -> None:
    """A file or a manifest that declares or expands to more than any memory."""
    if how == "length":
        path.write_bytes((2**63).to_bytes(8, "little") + b'{"__metadata__":{' + b" " * 100)
    elif how == "long header":
        path.write_bytes((99_000_000).to_bytes(8, "little") + b'{"a":' + b" " * 100)
    elif how == "shape":
        slot = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}
        header = json.dumps({"a": slot}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"abcd")
    elif how == "own shape":
        folder_of(path)
        rewrite(path, lambda body: body["tensors"]["weight"].__setitem__(1, [2**40, 2**20]))
    elif how == "empty shape":
        folder_of(path)

        def change(body: dict[str, Any]) -> None:
            chunk = body["tensors"]["bias"][2][0]
            body["tensors"]["bias"][1] = chunk[1] = [0, 2**62, 2**62]
            chunk[0], chunk[4] = [0, 0, 0], []

        rewrite(path, change)
    elif how == "depth":
        header = b'{"__metadata__":' + b"[" * 200_000
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    elif how == "own depth":
        folder_of(path)
        data = sharded_format.OPENING + b'1,"info":' + b"[" * 200_000 + b"]" * 200_000
        (path / sharded_format.MANIFEST).write_bytes(data + b',"xxh3":"' + digest(data).encode() + b'"}')


def at_url(path: Path, code: Payload, build: Callable[[Path, Payload], object], url: str) -> str:
    """Write the result of `build` to a URL instead of a path."""
    build(path, code)
    if url.startswith("zip"):
        packed = path.parent / "packed.zip"
        with zipfile.ZipFile(packed, "w") as archive:
            for file in sorted(path.rglob("*")):
                archive.write(file, f"run/{NAME}/{file.relative_to(path)}")
        return url.format(packed)
    if "memory" in url:
        fs = MemoryFileSystem()
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            where = f"/hostile/run/{NAME}" + ("" if file == path else f"/{file.relative_to(path)}")
            fs.pipe_file(where, file.read_bytes())
    return url.format(path)


def references(path: Path, code: Payload) -> str:
    """A URL at which fsspec makes files from templates."""
    call = "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}".replace("MARK", code.marker)
    table = {
        "version": 1,
        "templates": {"u": call},
        "gen": [{"key": call, "url": call, "dimensions": {"i": [1]}}],
        "refs": {f"run/{NAME}/manifest.json": [call, 0, 10], f"run/{NAME}/a": ["{{u}}", 0, 10]},
    }
    path.write_text(json.dumps(table))
    return f"reference://run/{NAME}::file://{path}"


Way = Callable[[Path, Payload], Any]

#: Each hides code at a path; it returns where, if not there.
REFUSED: dict[str, Way] = {
    "torch.save": torch_zip,
    "torch.save, legacy": torch_legacy,
    "a pickle named as a checkpoint": partial(raw_pickle, protocol=2),
    "a pickle of the newest protocol": partial(raw_pickle, protocol=5),
    "a pickle of the oldest protocol": partial(raw_pickle, protocol=0),
    "TorchScript": torch_script,
    "a folder of torch's own, its metadata a pickle": torch_folder,
    "a shard replaced by a pickle": partial(pickled_shard, how="short"),
    "a shard replaced by a pickle of its length": partial(pickled_shard, how="long"),
    "a shard replaced by torch.save": partial(pickled_shard, how="torch.save"),
    "a manifest replaced by a pickle": pickled_manifest,
    **{f"a call in a folder's JSON, {n}": partial(call_in_structure, number=n) for n in range(len(REQUESTS))},
    "code in a header's dtypes": header_entries,
    "npy of objects": partial(object_array, packed=False),
    "npz of objects": partial(object_array, packed=True),
    "tar that climbs out": tar_traversal,
    "zip that climbs out": zip_traversal,
    "a manifest that names a pickle above": partial(file_names, name="../evil.safetensors"),
    "a manifest that names a data file above": partial(file_names, name="../0123456789abcdef-00000.safetensors"),
    "a manifest that names an absolute path": partial(file_names, name="OUT/evil.safetensors"),
    "a data file that is a link": partial(linked, what="data"),
    "a manifest that is a link": partial(linked, what="manifest"),
    "a folder that is a link": partial(linked, what="folder"),
    **{
        f"a bomb: {how}": partial(bomb, how=how)
        for how in ("length", "long header", "shape", "own shape", "empty shape", "depth", "own depth")
    },
    "file:// of a pickle": partial(at_url, build=torch_zip, url="file://{}"),
    "file:// of a folder of torch's own": partial(at_url, build=torch_folder, url="file://{}"),
    "memory:// of a pickle": partial(at_url, build=torch_zip, url=f"memory://hostile/run/{NAME}"),
    "memory:// of a folder of torch's own": partial(at_url, build=torch_folder, url=f"memory://hostile/run/{NAME}"),
    "memory:// of a pickled shard": partial(
        at_url, build=partial(pickled_shard, how="long"), url=f"memory://hostile/run/{NAME}"
    ),
    "memory:// of a pickled manifest": partial(at_url, build=pickled_manifest, url=f"memory://hostile/run/{NAME}"),
    "simplecache:: of a pickled shard": partial(
        at_url, build=partial(pickled_shard, how="long"), url="simplecache::file://{}"
    ),
    "simplecache:: of a folder of torch's own": partial(at_url, build=torch_folder, url="simplecache::file://{}"),
    "zip:// of a pickled shard": partial(
        at_url, build=partial(pickled_shard, how="long"), url=f"zip://run/{NAME}::file://{{}}"
    ),
    "zip:// of a folder of torch's own": partial(at_url, build=torch_folder, url=f"zip://run/{NAME}::file://{{}}"),
    "reference:// of templates": references,
}

#: What looks like code here is data, or a file that belongs to no checkpoint: loading ignores it.
READ: dict[str, Way] = {
    "a shard that is a pickle, all checksums forged": partial(pickled_shard, how="forged"),
    "pickles beside": pickle_beside,
    "modules beside": side_files,
    "a file with values like calls": partial(calls_as_values, save=file_of),
    "a folder with values like calls": partial(calls_as_values, save=folder_of),
    "a header's metadata": header_metadata,
    "memory:// with pickles beside": partial(at_url, build=pickle_beside, url=f"memory://hostile/run/{NAME}"),
    "zip:// with modules beside": partial(at_url, build=side_files, url=f"zip://run/{NAME}::file://{{}}"),
}


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    """Clear fsspec's memory file system after the test."""
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    MemoryFileSystem.clear_instance_cache()
    for name in ("file", "zip", "reference", "simplecache"):
        fsspec.get_filesystem_class(name).clear_instance_cache()
    gc.collect()  # a cache's folder goes with it


@pytest.fixture(scope="module")
def lites() -> Iterator[dict[str, Lite]]:
    """A job of one rank with each plugin."""
    lites = {name: Lite(accelerator="cpu", devices=1, checkpoint=name) for name in PLUGINS}
    for lite in lites.values():
        lite.__enter__()
    yield lites
    for lite in reversed(lites.values()):
        lite.__exit__(None, None, None)


def ways_to_read(lites: dict[str, Lite], target: str, out: Path) -> dict[str, Callable[[], object]]:
    """Return every way to load or inspect `target`."""
    ways: dict[str, Callable[[], object]] = {}
    for name, lite in lites.items():
        model = nn.Linear(3, 2)
        plugin = made(PLUGINS[name])
        ways |= {
            f"{name}: load": partial(lite.load, target),
            f"{name}: load into objects": partial(lite.load, target, {"weight": torch.zeros(2, 3)}, strict=False),
            f"{name}: load_raw": partial(lite.load_raw, target, model),
            f"{name}: lazily": partial(load_lazily, plugin, target),
            f"{name}: at once": partial(plugin.checkpoint_load, path=target, trusted=False, lazy=False),
            f"{name}: inspect": partial(plugin.inspect, target),
        }
    for words in (
        ["inspect", target],
        ["inspect", target, "--json"],
        ["verify", target],
        ["convert", target, str(out / "file"), "--to=safetensors"],
        ["convert", target, str(out / "folder"), "--to=dcp"],
        ["convert", target, str(out / "plain"), "--weights=state_dict"],
    ):
        ways[f"command {' '.join(words[:1] + words[2:])}"] = partial(command, words)
    return ways


def load_lazily(plugin: Any, target: str) -> object:
    return materialize(plugin.checkpoint_load(path=target, trusted=False, lazy=True))


class CommandFailed(CheckpointError):
    """``plugframe checkpoint`` ended with an exit code."""


def command(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["checkpoint", *words])
    if ended.value.code:
        raise CommandFailed(str(ended.value.code))


def keepers(lites: dict[str, Lite], target: str) -> dict[str, Callable[[], object]]:
    """Return the ways of the checkpoint manager, which renames damaged checkpoints."""
    above = target.rpartition("/")[0]
    if "::" in target or not target.endswith(NAME):
        return {}
    ways: dict[str, Callable[[], object]] = {}
    for name, lite in lites.items():
        kept = lite.checkpoints(above, keep_best=("loss", "min", 1))
        state = {"weight": torch.zeros(2, 3)}
        ways |= {
            f"{name}: latest": kept.latest,
            f"{name}: best": kept.best,
            f"{name}: resume": partial(kept.resume, state, strict=False),
        }
    return ways


def tried(ways: dict[str, Callable[[], object]], marker: Path) -> dict[str, str]:
    """Read in every way; return the error of each, "" for success."""
    ended: dict[str, str] = {}
    for name, act in ways.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                act()
            except CheckpointError as error:
                ended[name] = str(error) or "refused"
            else:
                ended[name] = ""
        assert not marker.exists(), f"{name} ran what lay there"
    return ended


def hidden(tmp_path: Path, way: str, folder: str) -> tuple[str, Payload]:
    """Hide code under a new folder; return its path, and the code."""
    code = Payload(tmp_path / "ran")
    path = tmp_path / folder / NAME
    path.parent.mkdir()
    return {**REFUSED, **READ}[way](path, code) or str(path), code


@pytest.mark.usefixtures("capsys")
@pytest.mark.parametrize("way", [*REFUSED, *READ])
def test_no_code_in_a_checkpoint_runs(lites: dict[str, Lite], tmp_path: Path, way: str) -> None:
    """However it is read or inspected, a checkpoint is refused or data, and never run."""
    target, code = hidden(tmp_path, way, "run")
    ended = tried(ways_to_read(lites, target, tmp_path), Path(code.marker))
    whole = {name: text for name, text in ended.items() if name.endswith((": load", "lazily", "at once", "verify"))}
    assert len(whole) == 3 * len(PLUGINS) + 1
    if way in REFUSED:
        assert all(whole.values()), whole
    else:
        readers = ("remote", "command") if "://" in target else ("",)
        assert not any(text for name, text in whole.items() if name.startswith(readers)), whole
    for name, lite in lites.items():
        # What is damaged the keeper moves.
        target, code = hidden(tmp_path, way, name)
        tried(keepers({name: lite}, target), Path(code.marker))
    assert not list(tmp_path.rglob("escaped*"))


def test_trust_is_for_what_others_wrote(tmp_path: Path, lites: dict[str, Lite]) -> None:
    """trusted=True runs code of another tool's checkpoint, never of a plugframe checkpoint or of files beside it."""
    for number, (way, runs) in enumerate([*dict.fromkeys(READ, False).items(), ("torch.save", True)]):
        target, code = hidden(tmp_path, way, str(number))
        lites["remote" if "://" in target else "safetensors"].load(target, trusted=True)
        assert Path(code.marker).exists() is runs, way


def test_modules_in_a_checkpoint_are_not_imported(tmp_path: Path) -> None:
    """The command, run inside a folder with modules of known names, imports none of them."""
    code = Payload(tmp_path / "ran")
    path = tmp_path / NAME
    side_files(path, code)
    words = [sys.executable, "-I", "-m", "plugframe", "checkpoint", "inspect", "."]
    done = subprocess.run(words, cwd=path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "weight" in done.stdout
    assert not Path(code.marker).exists()
