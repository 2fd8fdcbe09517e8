"""Damage to a checkpoint of any format is detected, and a failed load changes nothing."""

from __future__ import annotations

import argparse
import collections
import copy
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from checkpoint_trees import random_tensor, same
from plugframe import Lite
from plugframe.checkpoint import Piece, digest, materialize, split
from plugframe.cli import cli
from plugframe.errors import CheckpointError, CheckpointMismatchError, PlugframeWarning
from plugframe.hooks.world import World
from plugframe_builtins._shared.checkpoint_files import sharded_format, single_file_reader
from plugframe_builtins._shared.checkpoint_files.index import Index
from plugframe_builtins._shared.checkpoint_files.tensor_file import CODES
from plugframe_builtins.remote_checkpoint import reading, writing
from plugframe_builtins.remote_checkpoint.storage import RemoteFolder
from ranks import run_ranks

#: What the keeper of a run's checkpoints takes for one.
NAME = "step-000000000001.ckpt"
#: The plugin and the place of each sharded_format.
FORMS = {
    "file": ("safetensors", "{}"),
    "folder": ("dcp", "{}"),
    "file://": ("remote", "file://{}"),
    "memory://": ("remote", "memory://damage{}"),
}
#: Together 400.
NUM_DAMAGES = {"flip": 60, "cut": 20, "swap": 12, "missing": 8}
NUM_SHARDS = 3


class Simple:
    """A minimal object with a state."""

    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def objects(seed: int) -> dict[str, Any]:
    """Return objects of a user to save and load."""
    torch.manual_seed(seed)
    first = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    second = nn.Linear(6, 6, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(first.parameters())
    first(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    return {
        "first": first,
        "second": second,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, seed + 1),
        "simple": Simple(seed),
        "tensor": random_tensor(torch.complex64, (3, 5), seed),
        "nested": [{"tensor": torch.full((7,), seed)}, seed],
        "step": seed,
    }


def content(value: Any) -> Any:
    """Return a copy of the contents of objects."""
    if isinstance(value, (nn.Module, Optimizer, Simple, torch.optim.lr_scheduler.LRScheduler)):
        return copy.deepcopy(value.state_dict())
    if isinstance(value, dict):
        return {key: content(item) for key, item in value.items()}
    return [content(item) for item in value] if isinstance(value, list) else copy.deepcopy(value)


# ---------------------------------------------------------------------- a checkpoint of many shards, of one process


def save_in_shards(url: str, tree: Mapping[str, Any], save_id: str) -> None:
    """Write the shards of several ranks: the largest tensor split, the others in turn."""
    folder = RemoteFolder(url)
    tensors, structure = split(tree, dtypes=CODES.keys())
    largest = max(tensors, key=lambda name: tensors[name].nbytes)
    ranks: list[dict[str, Piece]] = [{} for _ in range(NUM_SHARDS)]
    for number, (name, tensor) in enumerate(tensors.items()):
        shape = tuple(tensor.shape)
        if name != largest:
            ranks[number % NUM_SHARDS][name] = Piece(tensor, (0,) * len(shape), shape)
            continue
        rows = -(-shape[0] // NUM_SHARDS)
        for rank, part in enumerate(torch.split(tensor, rows)):
            ranks[rank][name] = Piece(part, (rank * rows, *(0,) * (len(shape) - 1)), shape)
    written = [writing.write(folder, save_id, rank, pieces) for rank, pieces in enumerate(ranks)]
    writing.commit(folder, save_id, written, structure, {"step": 1})


class Place:
    """The files of a checkpoint, on disk or in memory; a single file has the name ""."""

    def __init__(self, target: str) -> None:
        self.target = target
        fs, path = url_to_fs(target)
        self.fs: Any = fs
        self.path = str(path)

    def take(self) -> dict[str, bytes]:
        return {str(name)[len(self.path) + 1 :]: bytes(self.fs.cat_file(name)) for name in self.fs.find(self.path)}

    def put(self, files: Mapping[str, bytes]) -> None:
        if self.fs.exists(self.path):
            self.fs.rm(self.path, recursive=True)
        for name, data in files.items():
            path = f"{self.path}/{name}" if name else self.path
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(path, data)

    def find(self) -> Index:
        """Return the positions of tensors in the files."""
        if "://" in self.target:
            return reading.find(RemoteFolder(self.target))
        if Path(self.target).is_dir():
            return sharded_format.find(self.target)
        with open(self.target, "rb") as file:
            return single_file_reader.find(file, self.target)


class Stretch(NamedTuple):
    """Where a part of a tensor is stored."""

    file: str
    tensor: str
    start: int
    end: int
    xxh3: str


def stretches(found: Index) -> list[Stretch]:
    result = []
    for name, laid in found.tensors.items():
        for chunk in laid.chunks:
            size = int(np.prod(chunk.sizes)) * laid.dtype.itemsize
            if size:
                assert chunk.xxh3 is not None
                result.append(Stretch(chunk.file, name, chunk.start, chunk.start + size, chunk.xxh3[0]))
    return result


# ---------------------------------------------------------------------- damage


class Damage(NamedTuple):
    """A damaged checkpoint, and patterns that the error must match."""

    files: dict[str, bytes]
    patterns: list[str]


def some_tensor(tensors: set[str]) -> str:
    return "tensor '(?:{})'".format("|".join(map(re.escape, tensors)))


def flip(rng: random.Random, files: dict[str, bytes], places: list[Stretch]) -> Damage:
    """Flip one bit, in a tensor half of the time."""
    if rng.random() < 0.5:
        place = rng.choice(places)
        name, at = place.file, rng.randrange(place.start, place.end)
    else:
        name = rng.choice(sorted(files))
        at = rng.randrange(len(files[name]))
    data = bytearray(files[name])
    data[at] ^= 1 << rng.randrange(8)
    hit = [place for place in places if place.file == name and place.start <= at < place.end]
    patterns = [re.escape(name), "expected", "found"]
    for place in hit:
        wrong = digest(bytes(data[place.start : place.end]))
        patterns = [re.escape(name), some_tensor({place.tensor}), f"expected {place.xxh3}, found {wrong}"]
    return Damage({**files, name: bytes(data)}, patterns)


def cut(rng: random.Random, files: dict[str, bytes], places: list[Stretch]) -> Damage:
    """Truncate a file, or append to it."""
    name = rng.choice(sorted(files))
    size = len(files[name])
    keep = rng.choice([rng.randrange(size), rng.randrange(size), 0, size - 1, size + 1])
    lost = {place.tensor for place in places if place.file == name and place.end > keep}
    data = files[name][:keep] if keep <= size else files[name] + b"\0"
    patterns = [re.escape(name), "expected", "found"]
    head = min((place.start for place in places if place.file == name), default=0)
    if name != sharded_format.MANIFEST and (name or keep >= head):
        patterns += [f"expected {size} bytes, found {keep}", *([some_tensor(lost)] if lost else [])]
    return Damage({**files, name: data}, patterns)


def swap(rng: random.Random, files: dict[str, bytes], places: list[Stretch], others: dict[str, bytes]) -> Damage:
    """Swap two files, or sections of one, within this checkpoint or with another."""
    shards = sorted(name for name in files if name != sharded_format.MANIFEST)
    how = rng.choice(["tensors", "shards", "other shard", "other manifest"] if len(files) > 1 else ["tensors", "tail"])
    if how == "tensors":
        a, b = rng.choice([(a, b) for a in places for b in places if _swappable(files, a, b)])
        changed = {name: bytearray(data) for name, data in files.items()}
        changed[a.file][a.start : a.end] = files[b.file][b.start : b.end]
        changed[b.file][b.start : b.end] = files[a.file][a.start : a.end]
        damaged = {name: bytes(data) for name, data in changed.items()}
        return Damage(damaged, [some_tensor({a.tensor, b.tensor}), "expected [0-9a-f]{16}, found [0-9a-f]{16}"])
    if how == "shards":
        one, two = rng.sample(shards, 2)
        return Damage(
            {**files, one: files[two], two: files[one]}, [f"{one}|{two}", "tensor '|is longer", "expected", "found"]
        )
    if how == "other shard":
        name = rng.choice(shards)
        other = next(other for other in others if other[-18:] == name[-18:])
        lost = {place.tensor for place in places if place.file == name}
        return Damage({**files, name: others[other]}, [name, some_tensor(lost), "expected", "found"])
    if how == "other manifest":
        gone = next(name for name in sorted(others) if name != sharded_format.MANIFEST)
        return Damage(
            {**files, sharded_format.MANIFEST: others[sharded_format.MANIFEST]}, [gone, "tensor '", "expected", "found"]
        )
    tail = rng.randrange(30, 2000)
    return Damage({"": files[""][:-tail] + others[""][-tail:]}, ["expected", "found"])


def _swappable(files: Mapping[str, bytes], a: Stretch, b: Stretch) -> bool:
    same_size = a.end - a.start == b.end - b.start
    return same_size and files[a.file][a.start : a.end] != files[b.file][b.start : b.end]


def missing(rng: random.Random, files: dict[str, bytes], places: list[Stretch]) -> Damage:
    """Remove a file."""
    name = rng.choice(sorted(files))
    lost = {place.tensor for place in places if place.file == name}
    left = {other: data for other, data in files.items() if other != name}
    if name in ("", sharded_format.MANIFEST):
        return Damage(left, [re.escape(name), "does not exist|not complete|holds"])
    size = len(files[name])
    return Damage(left, [name, some_tensor(lost), f"expected {size} bytes", "found no file"])


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    """Clear fsspec's memory file system after the test."""
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    MemoryFileSystem.clear_instance_cache()


@contextmanager
def running(form_name: str) -> Iterator[Lite]:
    with Lite(accelerator="cpu", devices=1, checkpoint=FORMS[form_name][0]) as lite:
        yield lite


def write(lite: Lite, form_name: str, target: str, seed: int) -> None:
    """Save objects as one file, or in shards."""
    lite.seed_everything(seed)
    if form_name == "file":
        lite.save(target, objects(seed))
        return
    lite.save(f"{target}-once", objects(seed))
    tree = lite.load(f"{target}-once") | {"__plugframe__": run_of(lite, f"{target}-once")}
    save_in_shards(target if "://" in target else f"file://{target}", tree, f"{seed:016x}")
    Place(f"{target}-once").put({})


def run_of(lite: Lite, target: str) -> Any:
    """Return the checkpoint's state of the run."""
    loaded = lite._session.hooks.checkpoint_load(path=target, trusted=False, lazy=False)
    return materialize(loaded["__plugframe__"])


@pytest.mark.parametrize("form_name", FORMS)
def test_no_damage_is_loaded(form_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No flipped bit, cut, swapped or missing file loads; the error names the damaged part, and no object changes."""
    target = FORMS[form_name][1].format(tmp_path / "run" / NAME)
    (tmp_path / "run").mkdir()
    rng = random.Random(20)
    with running(form_name) as lite:
        write(lite, form_name, f"{target}.other", 1)
        write(lite, form_name, target, 2)
        place, others = Place(target), Place(f"{target}.other").take()
        whole, places = place.take(), stretches(place.find())
        assert len(whole) == (1 if form_name == "file" else NUM_SHARDS + 1)
        mine = objects(3)
        before = content(mine)
        kinds: dict[str, Callable[..., Damage]] = {
            "flip": flip,
            "cut": cut,
            "swap": partial(swap, others=others),
            "missing": missing,
        }
        damages = [kinds[kind](rng, whole, places) for kind, number in NUM_DAMAGES.items() for _ in range(number)]
        assert len(damages) * len(FORMS) == 400
        for number, damage in enumerate(damages):
            assert damage.files != whole
            place.put(damage.files)
            for name, act in loads(lite, target, mine).items():
                with pytest.raises(CheckpointError) as error:
                    act()
                for pattern in [re.escape(target.removeprefix("file://")), *damage.patterns]:
                    assert re.search(pattern, str(error.value)), f"{number}, {name}: no {pattern} in: {error.value}"
                assert "\n" not in str(error.value)
            if number % 8 == 0:
                check_command(capsys, target, tmp_path, damage)
                check_keeper(lite, target, mine)
            assert same(content(mine), before), number
        place.put(whole)
        lite.load(target, mine)
        assert same(content(mine), content(objects(2)))


def loads(lite: Lite, target: str, mine: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """Return every way to load in a job."""
    hook = lite._session.hooks.checkpoint_load
    return {
        "load": partial(lite.load, target),
        "load into objects": partial(lite.load, target, mine),
        "load_raw": partial(lite.load_raw, target, mine["first"]),
        "lazily": partial(hook, path=target, trusted=False, lazy=True),
    }


def check_command(capsys: pytest.CaptureFixture[str], target: str, tmp_path: Path, damage: Damage) -> None:
    """Check that the command refuses it with the same message."""
    for words in (["verify", target], ["convert", target, str(tmp_path / "new"), "--force"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["checkpoint", *words])
        told = capsys.readouterr().err
        assert ended.value.code == 1, words
        for pattern in damage.patterns:
            assert re.search(pattern, told), f"{words}: no {pattern} in: {told}"
    assert not (tmp_path / "new").exists()


def check_keeper(lite: Lite, target: str, mine: dict[str, Any]) -> None:
    """Check that the checkpoint manager does not resume from damage."""
    kept = lite.checkpoints(target.rpartition("/")[0], keep_best=("loss", "min", 1))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            assert not kept.resume(mine)
            what = "removed" if told else ""
        except CheckpointError as error:
            what = f"{error}"
    assert re.search("^$|^removed$|are damaged and renamed", what)
    assert all(re.search("It is (removed|renamed to damaged-step-)", str(each.message)) for each in told)
    assert kept.best() is None
    assert kept.latest() is None
    damaged = Place(target.replace("step-", "damaged-step-"))
    damaged.put({})


@pytest.mark.parametrize("form_name", FORMS)
def test_checkpoints_in_each_others_place_are_not_resumed_from(form_name: str, tmp_path: Path) -> None:
    """An intact checkpoint under the name of another step is renamed, with a warning."""
    folder = FORMS[form_name][1].format(tmp_path / "run")
    with running(form_name) as lite:
        kept = lite.checkpoints(folder)
        for step in range(3):
            kept.save(step, {"step": step})
        one, two = (Place(f"{folder}/step-{step:012d}.ckpt") for step in (1, 2))
        files = one.take()
        one.put(two.take())
        two.put(files)
        state: dict[str, Any] = {"step": None}
        with pytest.warns(PlugframeWarning, match="wrong name: expected .* step [12], found .* step [12].* renamed"):
            assert kept.resume(state)
        assert (kept.step, state) == (0, {"step": 0})


# ---------------------------------------------------------------------- what fails changes nothing


class Refusing(Simple):
    """An object that returns its state and refuses to load one."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError("no")


def everything(lite: Lite, target: str, mine: dict[str, Any]) -> Any:
    """Return the contents of the objects and of the run: generators, loaders, the loss scaler."""
    lite.save(f"{target}-now", {})
    return content(mine), run_of(lite, f"{target}-now")


def last_shard(place: Place) -> str:
    return max(name for name in place.take() if name != sharded_format.MANIFEST)


def break_last_byte(place: Place) -> None:
    files = place.take()
    name = last_shard(place)
    data = bytearray(files[name])
    data[max(stretch.end for stretch in stretches(place.find()) if stretch.file == name) - 1] ^= 1
    place.put({**files, name: bytes(data)})


def lose_last_shard(place: Place) -> None:
    name = last_shard(place)
    place.put({other: data for other, data in place.take().items() if other != name})


def misfits(mine: dict[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """Return states that mismatch only in what is restored last, and the error messages."""
    second = nn.Linear(6, 7, dtype=torch.bfloat16)
    complex_model = nn.Linear(6, 6, dtype=torch.float32)
    two_groups = torch.optim.AdamW([{"params": [p]} for p in mine["first"].parameters()])
    return {
        "shape in the last model": ({**mine, "second": second}, r"second.bias has shape \(7,\), .* has \(6,\)"),
        "no parameter in the last model": ({**mine, "second": nn.Identity()}, "unexpected in second: weight, bias"),
        "other groups": ({**mine, "optimizer": two_groups}, "optimizer has parameter groups"),
        "shape of the last tensor": (
            {**mine, "tensor": torch.zeros(3, 6, dtype=torch.complex64)},
            r"tensor has shape \(3, 6\), the checkpoint has \(3, 5\)",
        ),
        "no such key": ({**mine, "more": 1}, "missing: 'more'"),
        "dtype of the last tensor": ({**mine, "tensor": torch.zeros(3, 5)}, "tensor is of torch.float32, which cannot"),
        "not a model": ({**mine, "step": complex_model}, "step is a int, not the state of a module"),
    }


@pytest.mark.parametrize("form_name", FORMS)
def test_a_failed_load_changes_nothing(form_name: str, tmp_path: Path) -> None:
    """Damage to the last shard, and mismatches, are found before the first value is written."""
    target = FORMS[form_name][1].format(tmp_path / "run" / NAME)
    (tmp_path / "run").mkdir()
    with running(form_name) as lite:
        mine = objects(3)
        lite.setup(mine["first"])
        loader = lite.setup_dataloaders(DataLoader(list(range(20)), batch_size=2, shuffle=True))  # type: ignore[arg-type]
        write(lite, form_name, target, 2)
        place = Place(target)
        whole = place.take()
        batches = iter(loader)
        next(batches)
        misfitting = misfits(mine)
        before = everything(lite, target, mine)
        for break_it in (break_last_byte, lose_last_shard):
            break_it(place)
            for name, act in loads(lite, target, mine).items():
                with pytest.raises(CheckpointError):
                    act()
                assert same(everything(lite, target, mine), before), (break_it, name)
            place.put(whole)
        for name, (asked, text) in misfitting.items():
            asked_before = content(asked)
            with pytest.raises(CheckpointMismatchError, match=f"nothing was changed.*{text}"):
                lite.load(target, asked)
            assert same(content(asked), asked_before), name
            assert same(everything(lite, target, mine), before), name
        with pytest.raises(KeyError, match="no"):
            lite.load(target, {**mine, "simple": Refusing()})
        # Objects before it have taken theirs, and are given back what they had.
        assert same(everything(lite, target, mine), before)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (3, r"second.weight is a tensor, the checkpoint has 3"),
        (torch.zeros(6, 6, dtype=torch.complex64), r"second.weight is of torch.bfloat16, .* hold .* torch.complex64"),
        (torch.zeros(6, 6, 1), r"second.weight has shape \(6, 6\), the checkpoint has \(6, 6, 1\)"),
    ],
)
@pytest.mark.parametrize("raw", [False, True])
def test_entries_no_model_takes_are_found_before(tmp_path: Path, entry: Any, text: str, raw: bool) -> None:
    """Errors inside a module's own load_state_dict are found before anything is written."""
    with running("file") as lite:
        second = {"weight": entry, "bias": torch.zeros(6, dtype=torch.bfloat16)}
        mine = objects(3)
        lite.save(tmp_path / "x", second if raw else {**objects(2), "second": second})
        before = content(mine)
        with pytest.raises(CheckpointMismatchError, match=text.replace("second", "object") if raw else text):
            lite.load_raw(tmp_path / "x", mine["second"]) if raw else lite.load(tmp_path / "x", mine)
        assert same(content(mine), before)


def _two_ranks(world: World, folder: str) -> dict[str, tuple[str, str]]:
    """Load a checkpoint that matches on one rank only; return each error and which objects changed."""
    outcomes: dict[str, tuple[str, str]] = {}
    target = f"{folder}/last"
    with Lite(accelerator="cpu", devices=world.world_size, strategy="fsdp", checkpoint="dcp") as lite:
        model, optimizer = lite.setup(*_model_and_optimizer())
        mine = {
            "model": model,
            "optimizer": optimizer,
            "simple": Simple([1]),
            "tensor": torch.ones(3),
            "other": Simple(1),
        }
        lite.save(target, mine)
        before = _of_rank(lite, mine)
        shard = Path(target) / max(path.name for path in Path(target).glob("*.safetensors"))
        assert shard.name.endswith("-00001.safetensors")
        whole = shard.read_bytes()
        lite.barrier()

        def attempt(what: str, asked: dict[str, Any]) -> None:
            asked["simple"].value = [2]
            text = ""
            try:
                lite.load(target, asked)
            except (CheckpointError, KeyError) as error:
                text = f"{type(error).__name__}: {error}"
            changed = [name for name, value in before.items() if not same(_of_rank(lite, mine)[name], value)]
            changed.remove("simple") if asked["simple"].value == [2] else None
            outcomes[what] = (text, ", ".join(changed))
            asked["simple"].value = [1]

        if world.global_rank == 1:
            shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        lite.barrier()
        attempt("damage", mine)
        if world.global_rank == 1:
            shard.write_bytes(whole)
        lite.barrier()
        second = world.global_rank == 1
        attempt("shape", {**mine, "tensor": torch.zeros(4)} if second else mine)
        attempt("refused", {**mine, "other": Refusing()} if second else mine)
        attempt("whole", mine)
    return outcomes


def _model_and_optimizer() -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    return model, torch.optim.AdamW(model.parameters())


def _of_rank(lite: Lite, mine: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of the objects on this rank, and of its generators."""
    parts = {name: p.to_local().detach().clone() for name, p in mine["model"].named_parameters()}
    kept = {key: value for key, value in content(mine["optimizer"]).items() if key == "param_groups"}
    return {
        "model": parts,
        "optimizer": kept,
        "simple": content(mine["simple"]),
        "tensor": mine["tensor"].clone(),
        "other": content(mine["other"]),
        "rng": torch.get_rng_state(),
    }


def test_what_fails_on_one_rank_changes_nothing_on_any(tmp_path: Path) -> None:
    """A damaged shard, tensor or object of one rank makes all ranks refuse the checkpoint."""
    first, second = run_ranks(2, _two_ranks, str(tmp_path))
    assert first["damage"] == second["damage"]
    assert re.search(r"-00001\.safetensors: tensor '.*expected \w{16}, found \w{16}", first["damage"][0])
    mismatch = r"CheckpointMismatchError: .*{}nothing was changed. tensor has shape \(4,\), the checkpoint has \(3,\)"
    assert re.search(mismatch.format("on rank 1; "), first["shape"][0])
    assert re.search(mismatch.format(""), second["shape"][0])
    assert re.search(
        r"did not accept its state on rank 1; nothing was changed. other: KeyError: 'no'", first["refused"][0]
    )
    assert second["refused"][0].startswith("KeyError")
    assert [changed for outcome in (first, second) for _, changed in outcome.values()] == [""] * 8
    assert first["whole"][0] == second["whole"][0] == ""


# ---------------------------------------------------------------------- save refuses what load would


class Own:
    """A user's class."""


class Slots:
    """An object with an unexpected attribute."""

    __slots__ = ("a",)


@pytest.mark.parametrize("form_name", FORMS)
def test_save_refuses_by_key_what_load_would(form_name: str, tmp_path: Path) -> None:
    """Values that could not be loaded are refused with their path, at any depth, and nothing is written."""
    target = FORMS[form_name][1].format(tmp_path / "last")
    refused: dict[str, Any] = {
        "namespace": argparse.Namespace(lr=1),
        "own": Own(),
        "class": Own,
        "slots": Slots(),
        "code": lambda: 1,
        "builtin": print,
        "module": random,
        "objects": np.array([Own()], dtype=object),
        "records": np.zeros(2, dtype=[("a", "i4")]),
        "text": np.array(["a"]),
        "time": np.datetime64("2020-01-01"),
        "set": {1, 2},
        "frozen": frozenset([1]),
        "deque": collections.deque([1]),
        "range": range(3),
        "generator": (number for number in [1]),
        "path": tmp_path,
        "device": torch.device("cpu"),
        "random": torch.Generator(),
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "keys": {(1, 2): 3},
        "truth": {True: 3},
        "reals": {1.5: 3},
        "nothing": {None: 3},
        "object": object(),
        "undecided": NotImplemented,
        "error": ValueError("a"),
    }
    deep: Any = Own()
    for number in range(40):
        deep = [(deep,)] if number % 2 else {number: {"a": deep}}
    bottomless: Any = 1
    for _ in range(200):
        bottomless = [bottomless]
    circle: list[Any] = []
    circle.append(circle)
    with running(form_name) as lite:
        lite.save(target, {"step": 1})
        before = Place(target).take()
        state = {
            "a": {"b.c": [refused]},
            "deep": deep,
            "bottomless": bottomless,
            "circle": circle,
            "fine": torch.ones(2),
        }
        with pytest.raises(CheckpointError, match="nothing was written") as error:
            lite.save(target, state)
        for key in refused:
            assert f"state['a']['b.c'][0][{key!r}]" in str(error.value), key
        assert "state['deep'][39]" not in str(error.value)
        for text in ("state['deep'][0]", "state['bottomless']", "state['circle']", f"{Own.__module__}.Own"):
            assert text in str(error.value)
        assert "fine" not in str(error.value)
        for key, value in [*refused.items(), ("deep", deep), ("bottomless", bottomless), ("circle", circle)]:
            with pytest.raises(CheckpointError, match=re.escape(f"state[{key!r}]")):
                lite.save(target, {key: value})
        assert Place(target).take() == before


@pytest.mark.parametrize("form_name", FORMS)
def test_what_save_takes_load_gives_back(form_name: str, tmp_path: Path) -> None:
    """At the maximum depth, with unusual keys, values and tensors, saved states load."""
    target = FORMS[form_name][1].format(tmp_path / "last")
    deepest: list[Any] = [1, 1, 1]
    for _ in range(98):
        deepest = [[deepest[0]], (deepest[1],), {-1: deepest[2]}]
    deep = {"lists": deepest[0], "tuples": deepest[1], "keys": deepest[2]}
    state: dict[str, Any] = {
        "deep": deep,
        "": {
            "": "",
            "a.b": 1,
            "a": {"b": torch.ones(1)},
            "\0": 1,
            "\ud800": "\udfff",
            "../x": 2,
            "__metadata__": torch.ones(1),
        },
        "numbers": [10**5000, -(2**70), float("nan"), float("-inf"), -0.0, complex("nan"), 5e-324],
        "mixed": {1: 2, "1": 3, -1: torch.zeros(())},
        "tensors": {f"t{n}": random_tensor(dtype, (2, 0, 3) if n % 2 else (), n) for n, dtype in enumerate(CODES)},
        "bytes": b"\x80\x04.",
        "dtype": torch.float8_e8m0fnu,
        "counter": collections.Counter({3: 4}),
        "nothing": [None, True, [], (), {}],
    }
    with running(form_name) as lite:
        lite.save(target, state)
        assert same(lite.load(target), state)
        assert same(
            materialize(lite._session.hooks.checkpoint_load(path=target, trusted=False, lazy=True)),
            {**state, "__plugframe__": run_of(lite, target)},
        )
