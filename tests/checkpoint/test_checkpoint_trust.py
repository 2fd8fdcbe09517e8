"""Removal, loading and reading of checkpoints depend on files only, never on the text of an error."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from plugframe import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointUnfinishedError,
    Lite,
    PlugframeWarning,
    seed_everything,
)
from plugframe.checkpoint import seal, split, unseal
from plugframe.cli import cli
from plugframe.hooks.world import World
from plugframe.lite import checkpointing
from plugframe.state.run import rng_state
from plugframe.utils.logging import warn_caller
from plugframe_builtins._shared.checkpoint_files import sharded_format
from plugframe_builtins._shared.checkpoint_files.coverage import fills, fills_file
from ranks import run_ranks

FORMATS = ("safetensors", "dcp")


@pytest.fixture(params=FORMATS)
def lite(request: pytest.FixtureRequest) -> Iterator[Lite]:
    with Lite(accelerator="cpu", devices=1, checkpoint=request.param) as made:
        made.launch()
        yield made


@pytest.fixture
def sharded() -> Iterator[Lite]:
    with Lite(accelerator="cpu", devices=1, checkpoint="dcp") as made:
        made.launch()
        yield made


def listed(folder: Path) -> list[str]:
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*"))


def step_name(step: int) -> str:
    return f"step-{step:012d}.ckpt"


# ---------------------------------------------------------------------- 1: what is removed


@pytest.mark.parametrize("where", ["key", "folder", "layer"])
def test_a_mismatch_with_any_words_in_it_removes_nothing(lite: Lite, tmp_path: Path, where: str) -> None:
    """A mismatch error with any message is raised, and the checkpoints stay."""
    words = "is not complete"
    folder = tmp_path / (words if where == "folder" else "run")
    key = f"epoch {words}: it has no manifest.json" if where == "key" else "model"
    layer = f"block {words}" if where == "layer" else "block"

    def made(width: int) -> dict[str, Any]:
        return {key: nn.ModuleDict({layer: nn.Linear(2, width)})}

    for step in (1, 2, 3):
        lite.checkpoints(folder).save(step, made(1))
    before = listed(folder)
    with pytest.raises(CheckpointMismatchError, match="does not fit"):
        lite.checkpoints(folder).resume(made(2))
    assert listed(folder) == before


@pytest.mark.parametrize("error", [CheckpointUnfinishedError, CheckpointCorruptError, CheckpointError, OSError])
def test_no_error_of_any_class_removes_a_checkpoint(
    lite: Lite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """A checkpoint with a manifest survives any error while loading: at most it is renamed."""
    kept = lite.checkpoints(tmp_path)
    kept.save(1, {"a": 1})
    content = {name.removeprefix("damaged-") for name in listed(tmp_path)}

    def load(*_: Any, **__: Any) -> Any:
        raise error(f"{tmp_path} is not complete")

    monkeypatch.setattr(kept, "_load", load)
    if error is CheckpointCorruptError:
        with (
            pytest.warns(PlugframeWarning, match="is renamed to damaged-step-"),
            pytest.raises(CheckpointError, match="All 1 checkpoin"),
        ):
            kept.resume({"a": 0})
    else:
        with pytest.raises(error):
            kept.resume({"a": 0})
    assert {name.removeprefix("damaged-") for name in listed(tmp_path)} == content


def test_a_renamed_checkpoint_stays_when_the_next_is_renamed(lite: Lite, tmp_path: Path) -> None:
    """A second damaged checkpoint of one step does not replace the first."""
    for _ in range(2):
        lite.checkpoints(tmp_path).save(1, {"a": torch.arange(100)})
        path = tmp_path / step_name(1)
        data = path if path.is_file() else path / sharded_format.MANIFEST
        data.write_bytes(data.read_bytes()[:-9])
        with pytest.warns(PlugframeWarning, match="is renamed to damaged-step-"), pytest.raises(CheckpointError):
            lite.checkpoints(tmp_path).resume({"a": None})
    assert sorted(os.listdir(tmp_path)) == [f"damaged-{step_name(1)}", f"damaged-{step_name(1)}-2"]


def test_what_somebody_else_put_or_writes_there_is_not_removed(sharded: Lite, tmp_path: Path) -> None:
    """A folder with other files, or with a file that is being written, is not a completed save."""
    from plugframe.checkpoint import open_locked

    foreign, living = tmp_path / step_name(2), tmp_path / step_name(3)
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"is a folder, not a checkpoint file.*notes\.txt"):
        sharded.checkpoints(tmp_path).resume({})
    (foreign / "notes.txt").unlink()
    living.mkdir()
    file = open_locked(str(living / sharded_format.data_name("0" * 16, 0)))
    assert file is not None
    with file, pytest.raises(CheckpointUnfinishedError, match="is not complete"):
        sharded.checkpoints(tmp_path).resume({})
    assert living.is_dir()


def test_an_unfinished_checkpoint_takes_no_place_among_those_kept(sharded: Lite, tmp_path: Path) -> None:
    """keep_last counts complete checkpoints only; the one just saved always stays."""
    (tmp_path / step_name(9)).mkdir()
    kept = sharded.checkpoints(tmp_path, keep_last=1)
    for step in (4, 5):
        kept.save(step, {"a": step})
        assert kept.latest() == str(tmp_path / step_name(step))
    assert kept.save(2, {"a": 2})
    assert (tmp_path / step_name(2)).exists()


def test_a_failure_to_remove_an_old_one_is_no_failure_to_save(
    lite: Lite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an old checkpoint cannot be removed, save() warns and does not raise."""
    kept = lite.checkpoints(tmp_path, keep_last=1)
    kept.save(1, {"a": 1})

    def remove(path: str) -> None:
        raise CheckpointError(f"cannot remove {path}")

    monkeypatch.setattr(kept._session.hooks, "checkpoint_remove", remove)
    with pytest.warns(PlugframeWarning, match="is saved, but an older checkpoint could not be removed: cannot remove"):
        assert kept.save(2, {"a": 2})


# ---------------------------------------------------------------------- 2: all or nothing

_KINDS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "torch": (lambda state: state.update(torch=torch.zeros(7, dtype=torch.uint8)), "torch's generator"),
    "python": (lambda state: state["python"].update(version=99), "Python's generator"),
    "python words": (lambda state: state["python"].update(words=torch.zeros(3, dtype=torch.int64)), "Python's gen"),
    "numpy": (lambda state: state["numpy"].update(name="SFC64"), "NumPy's generator"),
    "nothing": (lambda state: state.clear(), "generator"),
    "kind": (lambda state: state.update(python=3), "Python's generator"),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_a_generator_state_that_does_not_fit_changes_nothing(
    lite: Lite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A generator state of another kind is refused before anything is written; rng=False loads everything else."""
    pytest.importorskip("numpy.random")
    change, text = _KINDS[kind]

    def changed() -> dict[str, Any]:
        state = rng_state()
        change(state)
        return state

    model, tensor = nn.Linear(2, 2), torch.ones(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "tensor": tensor, "value": 1}
    monkeypatch.setattr("plugframe.state.run.rng_state", changed)
    lite.save(tmp_path / "x", state)
    kept = model.weight.detach().clone()
    nn.init.zeros_(model.weight)
    tensor.zero_()
    optimizer.param_groups[0]["lr"], state["value"] = 0.25, 0
    seed_everything(7)
    before = rng_state()
    with pytest.raises(CheckpointMismatchError, match=f"nothing was changed.*{text}.*pass rng=False") as caught:
        lite.load(tmp_path / "x", state)
    assert "\n" not in str(caught.value)
    now = rng_state()
    assert all(torch.equal(now["torch"], before["torch"]) for _ in (0,))
    assert (model.weight.any(), tensor.any(), state["value"], optimizer.param_groups[0]["lr"]) == (
        False,
        False,
        0,
        0.25,
    )
    lite.load(tmp_path / "x", state, rng=False)
    assert torch.equal(model.weight, kept)
    assert state["value"] == 1
    assert torch.equal(rng_state()["torch"], before["torch"])


def test_the_generator_of_a_loader_is_tried_before(lite: Lite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that a loader's own generator refuses changes nothing; rng=False loads without it."""
    generator, data = torch.Generator(), list(range(8))
    loader = lite.setup_dataloaders(DataLoader(data, shuffle=True, generator=generator))  # type: ignore[arg-type]
    batches = iter(loader)
    next(batches)
    monkeypatch.setattr("plugframe.data.iteration.pack", lambda state: torch.zeros(3, dtype=torch.uint8))
    lite.save(tmp_path / "x", {"n": 1})
    before, state = generator.get_state(), {"n": 0}
    with pytest.raises(CheckpointMismatchError, match="the state of a Generator of a loader .*pass rng=False"):
        lite.load(tmp_path / "x", state)
    assert state == {"n": 0}
    assert torch.equal(generator.get_state(), before)
    lite.load(tmp_path / "x", state, rng=False)
    assert state == {"n": 1}
    assert len(list(loader)) == 7


class Scaler:
    """Returns a state, and refuses to load one."""

    def __init__(self) -> None:
        self.loaded: list[Any] = []

    def load(self, state: Any) -> None:
        self.loaded.append(state)
        if state == {"scale": "?"}:
            raise KeyError("growth")


def test_a_loss_scaler_or_loader_that_refuses_undoes_the_others(
    lite: Lite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of the run is restored before weights, and undone if one part raises."""
    hooks, scaler = lite._session.hooks, Scaler()
    model = nn.Linear(2, 2)
    monkeypatch.setattr(hooks, "precision_state", lambda: {"scale": "?"})
    lite.save(tmp_path / "x", {"model": model})
    monkeypatch.setattr(hooks, "precision_state", lambda: {"scale": 1})
    monkeypatch.setattr(hooks, "precision_load_state", lambda state: scaler.load(state))
    nn.init.zeros_(model.weight)
    with pytest.raises(CheckpointMismatchError, match="nothing was changed. the loss scaler: KeyError: 'growth'"):
        lite.load(tmp_path / "x", {"model": model})
    assert scaler.loaded == [{"scale": "?"}, {"scale": 1}]
    assert not model.weight.any()


@pytest.mark.parametrize("run", [3, [], {"rng": 1}, {"rng": [1], "loaders": {}, "precision": {}}, {"precision": []}])
def test_a_state_of_the_run_that_is_none_is_a_mismatch(lite: Lite, tmp_path: Path, run: Any) -> None:
    """Any invalid state of the run raises our error before anything is written."""
    torch.save({"a": 1, "__plugframe__": run}, tmp_path / "x")
    state = {"a": 0}
    with pytest.raises(CheckpointMismatchError, match="nothing was changed"):
        lite.load(tmp_path / "x", state)
    assert state == {"a": 0}


# ---------------------------------------------------------------------- 3: what is read


def boxes_of(draw: random.Random, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Divide a tensor recursively."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw.randrange(6)):
        offsets, sizes = boxes.pop(draw.randrange(len(boxes)))
        dim = draw.randrange(len(shape))
        at = draw.randrange(sizes[dim] + 1)
        first = (*sizes[:dim], at, *sizes[dim + 1 :])
        moved = (*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :])
        boxes += [(offsets, first), (moved, (*sizes[:dim], sizes[dim] - at, *sizes[dim + 1 :]))]
    return boxes


def test_coverage_is_exact() -> None:
    """The corner check equals a count of every element, whatever box was moved, grown, doubled or lost."""
    draw = random.Random(5)
    seen = {True: 0, False: 0}
    for _ in range(1500):
        shape = tuple(draw.randrange(1, 5) for _ in range(draw.randrange(1, 4)))
        boxes = boxes_of(draw, shape)
        for _ in range(draw.randrange(3)):
            number, dim = draw.randrange(len(boxes)), draw.randrange(len(shape))
            offsets, sizes = (list(each) for each in boxes[number])
            which = draw.choice((offsets, sizes))
            which[dim] = draw.randrange(shape[dim] + 1)
            if offsets[dim] + sizes[dim] <= shape[dim]:
                boxes[number] = (tuple(offsets), tuple(sizes))
        counts = dict.fromkeys(itertools.product(*map(range, shape)), 0)
        for offsets, sizes in boxes:
            for place in itertools.product(*(range(o, o + s) for o, s in zip(offsets, sizes, strict=True))):
                counts[place] += 1
        exact = all(count == 1 for count in counts.values())
        assert fills(shape, boxes) is exact, (shape, boxes)
        seen[exact] += 1
    assert min(seen.values()) > 100
    assert fills((), [((), ())])
    assert fills((0, 5), [])
    assert not fills((1,) * 9, [])
    assert fills_file(8, 20, [(8, 4), (12, 0), (12, 8)])
    assert not fills_file(8, 20, [(8, 8), (12, 8)])


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a folder's manifest, with a matching checksum."""
    manifest = path / sharded_format.MANIFEST
    body = json.loads(unseal(manifest.read_bytes(), where=""))
    manifest.write_bytes(seal(change(body) or body))


def raw(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the text of a folder's manifest, with a matching checksum."""
    from plugframe.checkpoint import digest

    manifest = path / sharded_format.MANIFEST
    body = change(unseal(manifest.read_bytes(), where=""))[:-1]
    manifest.write_bytes(body + b',"xxh3":"' + digest(body).encode() + b'"}')


def chunks(body: dict[str, Any], *boxes: tuple[list[int], list[int]]) -> None:
    """Replace the chunks of the 4 by 4 tensor `w`."""
    start = body["tensors"]["w"][2][0][3]
    body["tensors"]["w"][2] = [[offsets, sizes, 0, start, ["0" * 16]] for offsets, sizes in boxes]


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    os.truncate(path, 8 * 10**12)


def sized(body: dict[str, Any], size: Any) -> None:
    for head in body["files"].values():
        head[0] = size


def references(body: dict[str, Any]) -> None:
    body["structure"] = {"dict": {"w": [{"tensor": "w"}] * 200_000}}


LIES: dict[str, Callable[[Path], Any]] = {
    "overlap and hole": lambda p: rewritten(p, lambda b: chunks(b, ([0, 0], [2, 4]), ([1, 0], [2, 4]))),
    "overlap and hole in two dimensions": lambda p: rewritten(
        p, lambda b: chunks(b, ([0, 0], [2, 2]), ([0, 2], [2, 2]), ([2, 0], [2, 2]), ([1, 1], [2, 2]))
    ),
    "twice the same bytes": lambda p: rewritten(p, lambda b: b["tensors"].update(v=b["tensors"]["w"])),
    "bytes of nobody": lambda p: rewritten(p, lambda b: b["tensors"].pop("w") and None),
    "sums of nobody": lambda p: rewritten(p, lambda b: b["tensors"]["w"][2][0][4].append("0" * 16)),
    "sums that are none": lambda p: rewritten(p, lambda b: b["tensors"]["w"][2][0].__setitem__(4, [7])),
    "a size that is a float": lambda p: rewritten(p, lambda b: b["tensors"]["w"][1].__setitem__(0, 4.0)),
    "a size that is true": lambda p: rewritten(p, lambda b: b["tensors"]["w"][2][0].__setitem__(2, True)),
    "a negative file": lambda p: rewritten(p, lambda b: b["tensors"]["w"][2][0].__setitem__(2, -1)),
    "a file's size in words": lambda p: rewritten(p, lambda b: sized(b, "many")),
    "not a number": lambda p: raw(p, lambda data: data.replace(b"[4,4]", b"[4,NaN]", 1)),
    "infinity": lambda p: raw(p, lambda data: data.replace(b"[4,4]", b"[4,Infinity]", 1)),
    "a key twice": lambda p: raw(p, lambda data: data.replace(b'"tensors":{', b'"tensors":{"w":1,', 1)),
    "a field twice": lambda p: raw(p, lambda data: data[:-1] + b',"info":{"dict":{}}}'),
    "two million digits": lambda p: raw(p, lambda data: data.replace(b"[4,4]", b"[4," + b"9" * 2_000_000 + b"]", 1)),
    "two million digits in hexadecimal": lambda p: rewritten(
        p, lambda b: b.update(info={"dict": {"n": {"int": "0x" + "f" * 2_000_000}}})
    ),
    "200 000 references": lambda p: rewritten(p, references),
    "info that is a list": lambda p: rewritten(p, lambda b: b.update(info=[])),
    "info with a tensor": lambda p: rewritten(p, lambda b: b.update(info={"dict": {"t": {"tensor": "w"}}})),
    "a structure that is a number": lambda p: rewritten(p, lambda b: b.update(structure=3)),
    "a structure that is a list": lambda p: rewritten(p, lambda b: b.update(structure=[{"tensor": "w"}])),
    "a manifest that waits": lambda p: fifo(p / sharded_format.MANIFEST),
    "a manifest that does not end": lambda p: device(p / sharded_format.MANIFEST),
    "a manifest with holes": lambda p: sparse(p / sharded_format.MANIFEST),
    "a file that waits": lambda p: fifo(next(p.glob("*.safetensors"))),
    "a file that does not end": lambda p: device(next(p.glob("*.safetensors"))),
    "a file with holes": lambda p: sparse(next(p.glob("*.safetensors"))),
    "a file with holes that is said to have them": lambda p: (
        rewritten(p, lambda b: sized(b, 8 * 10**12)),
        sparse(next(p.glob("*.safetensors"))),
    ),
}


def within(seconds: float, act: Callable[[], object]) -> BaseException | None:
    """Return the error of `act`, run in a thread that is abandoned if it does not end."""
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            act()
            ended.append(None)
        except BaseException as error:  # noqa: BLE001 any error
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert ended, "it hangs"
    return ended[0]


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_refused_by_every_door(sharded: Lite, tmp_path: Path, lie: str, capsys: Any) -> None:
    """Loaded eagerly or lazily, inspected or verified, it raises our error at once."""
    path = tmp_path / "x"
    sharded._session.plugins["checkpoint"].checkpoint_save(
        path=str(path), state={"w": torch.arange(16.0).view(4, 4)}, info={"a": 1}, wait=True
    )
    LIES[lie](path)
    plugin = sharded._session.plugins["checkpoint"]
    for lazy in (False, True):
        error = within(
            30.0,
            lambda lazy=lazy: plugin.checkpoint_load(path=str(path), trusted=False, lazy=lazy),  # type: ignore[misc]
        )
        assert isinstance(error, CheckpointError), (lazy, error)
        assert len(str(error)) < 1000
    error = within(30.0, lambda: sharded.load(path, {"w": torch.zeros(4, 4)}))
    assert isinstance(error, CheckpointError), error
    ended = within(30.0, lambda: cli.main(["checkpoint", "verify", str(path)]))
    assert isinstance(ended, SystemExit)
    assert ended.code == 1
    assert "Traceback" not in capsys.readouterr().err
    looked = within(30.0, lambda: plugin.inspect(str(path)))
    assert looked is None or isinstance(looked, CheckpointError), looked


@pytest.mark.parametrize("how", ["sparse", "fifo", "plain", "torch"])
def test_a_single_file_that_lies_is_refused(sharded: Lite, tmp_path: Path, how: str) -> None:
    """A file of any type, longer than its disk or not a file, raises our error at once."""
    path = tmp_path / "x"
    if how == "plain":
        header = json.dumps({"a": {"dtype": "U8", "shape": [8 * 10**12], "data_offsets": [0, 8 * 10**12]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + 8 * 10**12)
    elif how == "torch":
        torch.save({"a": torch.ones(2)}, path)
        sparse(path)
    else:
        with Lite(accelerator="cpu", devices=1, checkpoint="safetensors") as lite:
            lite.save(path, {"a": 1})
        (sparse if how == "sparse" else fifo)(path)
    plugin = sharded._session.plugins["checkpoint"]
    for lazy in (False, True):
        error = within(
            30.0,
            lambda lazy=lazy: plugin.checkpoint_load(path=str(path), trusted=False, lazy=lazy),  # type: ignore[misc]
        )
        assert isinstance(error, CheckpointError), error


def test_metrics_and_steps_of_a_wrong_kind_are_no_raw_errors(lite: Lite, tmp_path: Path) -> None:
    """A checkpoint with invalid `info` is renamed."""
    kept = lite.checkpoints(tmp_path, keep_last=None, keep_best=("loss", "min", 1))
    kept.save(1, {"a": 1}, {"loss": math.inf})
    for step, info in enumerate(({"metrics": [1]}, {"metrics": {"loss": "low"}}, {"step": "x"}, {"step": 2.5}), 2):
        checkpointing.save(lite, tmp_path / step_name(step), {"a": step}, info={"step": step, **info}, wait=True)
    huge = {"step": 9, "metrics": {"loss": 2**2000}}
    checkpointing.save(lite, tmp_path / step_name(9), {"a": 9}, info=huge, wait=True)
    assert kept.best() == str(tmp_path / step_name(1))
    state = {"a": 0}
    with pytest.warns(PlugframeWarning, match="is renamed to damaged-step-"):
        assert kept.resume(state)
    assert (kept.step, state) == (1, {"a": 1})


def test_save_refuses_what_load_would() -> None:
    """A too long integer, and too many references to one tensor, are refused before writing."""
    with pytest.raises(CheckpointError, match=r"state\['n'\] is an integer of 7000001 bits"):
        split({"n": 1 << 7_000_000})
    with pytest.raises(CheckpointError, match="is the same tensor for the 50001th time"):
        split({"n": [torch.ones(1)] * 60_000})


def test_fuzzed_manifests_never_get_through(sharded: Lite, tmp_path: Path) -> None:
    """A manifest with any value replaced, and correct checksums, loads the saved state or is refused."""
    path = tmp_path / "x"
    plugin = sharded._session.plugins["checkpoint"]
    plugin.checkpoint_save(path=str(path), state={"w": torch.arange(16.0).view(4, 4), "n": 3}, info={}, wait=True)
    original = (path / sharded_format.MANIFEST).read_bytes()
    body = json.loads(unseal(original, where=""))
    draw = random.Random(3)
    values = [None, True, -1, 0, 1, 2**63, 2**70, 1.5, "", "w", [], {}, [0], {"dict": {}}, {"tensor": "w"}, [[0], [1]]]

    def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        if path:
            yield path
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, item in items:
            yield from places(item, (*path, key))

    everywhere = [place for place in places(body) if place[0] != "xxh3"]
    for _ in range(400):
        changed = json.loads(json.dumps(body))
        *above, last = draw.choice(everywhere)
        node = changed
        for key in above:
            node = node[key]
        node[last] = draw.choice(values)
        (path / sharded_format.MANIFEST).write_bytes(seal(changed))
        for lazy in (False, True):
            try:
                state = plugin.checkpoint_load(path=str(path), trusted=False, lazy=lazy)
            except CheckpointError:
                continue
            state = sharded.load(path) if lazy else state
            if "w" in state and isinstance(state["w"], torch.Tensor):
                assert torch.equal(state["w"], torch.arange(16.0).view(state["w"].shape)), changed


# ---------------------------------------------------------------------- 4: what only a later rank has


def _unfit_on_one(lite: Lite, path: str) -> str:
    """Save an invalid generator state of rank 1 only; return the error of loading it on this rank."""
    with pytest.MonkeyPatch.context() as patch:
        if lite.global_rank == 1:
            patch.setattr("plugframe.state.run.rng_state", lambda: {**rng_state(), "python": 3})
        lite.save(path, {"a": torch.ones(2)})
    state, before = {"a": torch.zeros(2)}, torch.get_rng_state()
    with pytest.raises(
        CheckpointMismatchError, match=r"nothing was changed\. the state of Python's generator"
    ) as caught:
        lite.load(path, state)
    assert not state["a"].any()
    assert torch.equal(torch.get_rng_state(), before)
    lite.load(path, state, rng=False)
    assert state["a"].all()
    return str(caught.value).replace(" on rank 1", "")


def _held_by_one(world: World, folder: str) -> list[str]:
    """Save tensors of one rank under several keys, in every format; return the errors."""
    said = []
    for checkpoint in FORMATS:
        with Lite(accelerator="cpu", devices=2, checkpoint=checkpoint) as lite:
            rank = lite.global_rank
            stage = {f"{rank}.weight": torch.ones(2)}
            states: list[dict[str, Any]] = [
                {"model": stage},
                {"large": {} if rank == 0 else {"w": torch.ones(100, 300)}},
                {"list": [{"a": 1} if rank == 0 else {"b": torch.ones(1)}]},
            ]
            for state in states:
                try:
                    lite.save(f"{folder}/x", state)
                    said.append("saved")
                except CheckpointError as error:
                    said.append(str(error))
            said.append(_unfit_on_one(lite, f"{folder}/{checkpoint}"))
            # Plain values are those of rank 0, also lists of different lengths.
            lite.save(f"{folder}/{checkpoint}", {"seen": [torch.ones(1)] * (1 + rank), "n": rank})
    return said


def test_what_is_wrong_on_one_rank_is_refused_on_all(tmp_path: Path) -> None:
    """A tensor of a later rank only is refused by key, an invalid generator state before anything changes."""
    first, second = run_ranks(2, _held_by_one, str(tmp_path))
    assert first == second
    for number, name in enumerate(["model.1.weight", "large.w", "list.*.b", ""] * 2):
        assert not name or f"'{name}' is a tensor on rank 1 and not on rank 0" in first[number], first[number]
    assert sorted(os.listdir(tmp_path)) == ["dcp", "safetensors"]


# ---------------------------------------------------------------------- 6: two jobs


_OTHER_JOB = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_job_in_a_folder_is_refused_by_name(lite: Lite, tmp_path: Path) -> None:
    """A second job saves, removes and renames nothing while the first one runs."""
    kept = lite.checkpoints(tmp_path)
    kept.save(1, {"a": torch.arange(100)})
    kept._files.lock.release()
    unfinished = tmp_path / step_name(8)
    unfinished.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", _OTHER_JOB, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        before = listed(tmp_path)
        second = lite.checkpoints(tmp_path, keep_last=1)
        with pytest.raises(CheckpointError, match=rf"another job \(process {other.pid}\) saves into this folder"):
            second.save(2, {"a": 2})
        state: dict[str, Any] = {"a": None}
        with pytest.warns(PlugframeWarning) as told:
            assert second.resume(state)
        texts = [str(each.message) for each in told]
        assert "nothing in it is removed or renamed" in texts[0]
        assert "skipped" in texts[1]
        assert listed(tmp_path) == before
    finally:
        other.kill()
        other.communicate()
    with pytest.warns(PlugframeWarning, match="is not complete.* It is removed"):
        assert second.resume(state)
    second.save(2, {"a": 2})
    assert os.listdir(tmp_path) == [step_name(2)]


def test_a_folder_is_held_by_the_process_and_no_child(lite: Lite, tmp_path: Path) -> None:
    """Two managers of one process share the lock; a forked child does not hold it; tear-down releases it."""
    import fcntl

    first, second = lite.checkpoints(tmp_path), lite.checkpoints(tmp_path)
    first.save(1, {"a": 1})
    second.save(2, {"a": 2})
    (here, there), (ready, begun) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(there)
        os.write(begun, b"!")
        os.read(here, 1)
        os._exit(0)
    os.close(here)
    try:
        os.read(ready, 1)
        descriptor = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lite.teardown()
        del first, second
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    finally:
        for end in (there, ready, begun):
            os.close(end)
        os.waitpid(child, 0)


def test_where_a_folder_cannot_be_locked_a_file_in_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems lock only files open for writing."""
    import errno
    import fcntl
    import stat

    from plugframe.checkpoint.lock import LOCK_FILE, FolderLock

    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "no")
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FolderLock(str(tmp_path))
    assert lock.take()
    assert os.listdir(tmp_path) == [LOCK_FILE]
    descriptor = os.open(tmp_path / LOCK_FILE, os.O_RDWR)
    with pytest.raises(BlockingIOError):
        real(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert FolderLock(str(tmp_path)).owner() == f"process {os.getpid()}"
    lock.release()
    real(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not FolderLock(str(tmp_path)).take()
    os.close(descriptor)


# ---------------------------------------------------------------------- 7: what reaches the terminal

_EVIL = "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m\rgone"


def test_text_from_a_file_is_escaped(lite: Lite, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No key, value, name or message from a checkpoint reaches a terminal unescaped."""
    checkpointing.save(
        lite,
        tmp_path / "x",
        {_EVIL: {_EVIL: torch.ones(1)}, "v": {_EVIL: [_EVIL]}},
        info={_EVIL: _EVIL, "plugins": {_EVIL: _EVIL}},
        wait=True,
    )
    for way in (["inspect"], ["inspect", "--json"], ["verify"]):
        with pytest.raises(SystemExit):
            cli.main(["checkpoint", *way, str(tmp_path / "x")])
    with pytest.raises(SystemExit):
        cli.main(["checkpoint", "convert", str(tmp_path / "x"), str(tmp_path / "y"), "--weights=no"])
    out, err = capsys.readouterr()
    with pytest.raises(CheckpointMismatchError) as caught:
        lite.load(tmp_path / "x", {"model": nn.Linear(1, 1), _EVIL: nn.Linear(1, 1)})
    torch.save({"a": {_EVIL: 1}}, tmp_path / "t")
    data = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(data.replace(_EVIL.encode(), b"cos\nsystem".ljust(len(_EVIL.encode()))))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a\x1b[2Jb").touch()
    with pytest.raises(CheckpointError) as folder:
        lite.load(tmp_path / "folder")
    with pytest.warns(PlugframeWarning) as told:
        warn_caller(_EVIL)
    texts = [out, err, str(caught.value), str(folder.value), str(told[0].message)]
    for text in texts:
        assert not set(text) & set("\x1b\x07\u202e\x9b\r"), text
    assert "\\x1b[2J" in out
    assert "\\x1b[2J" in str(caught.value)


def test_errors_of_every_kind_are_escaped_once() -> None:
    """The message of an error, also from another rank, has no control characters, and is escaped once."""
    from plugframe.errors import RankFailedError, RankLostError, printable, printable_cause

    for cls in (CheckpointError, RankFailedError, RankLostError):
        text = str(cls(f"a\n\tb{_EVIL}"))
        assert text.startswith("a\n\tb\\x1b]0;owned\\x07")
        assert str(cls(text)) == text
    assert "\x1b" not in RankFailedError(_EVIL).report
    assert printable("é ☃ 👩‍👧 a\tb\n") == "é ☃ 👩‍👧 a\tb\n"
    assert printable("a\tb\n", one_line=True) == "a\\tb\\n"
    assert printable_cause(ValueError(_EVIL)) is None
    plain = ValueError("plain")
    assert printable_cause(plain) is plain
