"""The checkpoint at a URL: in memory for one rank, and for two on a store that both reach."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.core import url_to_fs
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from checkpoint_trees import bits, random_tensor, same
from plugframe import Lite
from plugframe.checkpoint import fill, materialize
from plugframe.errors import CheckpointCorruptError, CheckpointError, PlugframeWarning
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins.dcp_checkpoint.checkpoint import ShardedCheckpoint
from plugframe_builtins.remote_checkpoint import writing
from plugframe_builtins.remote_checkpoint.checkpoint import RemoteCheckpoint
from plugframe_builtins.single.one_rank import OneRank
from plugframe_builtins.torch_collective.collective import TorchCollective
from ranks import hooks_of, run_checks
from shared_store import SharedStore

URL = "memory://remote-tests/run/last"


class Crash(BaseException):
    """The end of a process, which no code can do anything about."""


@pytest.fixture
def store() -> Iterator[dict[str, bytes]]:
    """The files of fsspec's memory, which are gone after the test."""
    assert not MemoryFileSystem.store
    yield MemoryFileSystem.store
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    MemoryFileSystem.clear_instance_cache()


@pytest.fixture
def remote(store: Any) -> Iterator[RemoteCheckpoint]:
    """The plugin, set up for one rank."""
    checkpoint = RemoteCheckpoint()
    checkpoint.checkpoint_setup(context=alone())
    yield checkpoint
    checkpoint.checkpoint_teardown()


def alone() -> Context:
    return Context(world=World(), device=torch.device("cpu"), hooks=hooks_of(OneRank()), names={"checkpoint": "remote"})


def save(checkpoint: Any, state: dict[str, Any], url: str = URL) -> None:
    assert checkpoint.checkpoint_save(path=url, state=state, info={"saved": "by"}, wait=True) is None


def load(checkpoint: Any, url: str = URL, *, lazy: bool = True) -> Any:
    return checkpoint.checkpoint_load(path=url, trusted=False, lazy=lazy)


def names() -> list[str]:
    return sorted(name.rpartition("/")[2] for name in MemoryFileSystem().find(URL))


def some_state(seed: int = 0) -> dict[str, Any]:
    many = {f"layer{number}": random_tensor(torch.bfloat16, (number, 3), seed + number) for number in range(40)}
    large = random_tensor(torch.float32, (1500, 1000), seed)
    return {"model": {**many, "large": large, "odd": random_tensor(torch.complex64, (3, 2), seed)}, "step": seed}


def damage(name: str, change: Callable[[bytearray], Any]) -> None:
    fs = MemoryFileSystem()
    data = bytearray(fs.cat_file(f"{URL}/{name}"))
    change(data)
    fs.pipe_file(f"{URL}/{name}", bytes(data))


def flip(at: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[at] ^= 4

    return change


# ---------------------------------------------------------------------- one rank


@pytest.mark.parametrize("lazy", [True, False])
def test_everything_comes_back(remote: RemoteCheckpoint, lazy: bool) -> None:
    """What is loaded is what was saved, to the last bit, read at once or later."""
    save(remote, some_state())
    assert same(materialize(load(remote, lazy=lazy)), some_state())


def test_the_content_is_told_without_reading_it(remote: RemoteCheckpoint) -> None:
    """`inspect` gives shapes and info of a checkpoint at a URL."""
    save(remote, some_state())
    contents = remote.inspect(URL)
    assert contents.info == {"saved": "by"}
    assert contents.num_files == 2
    assert contents.size_bytes == MemoryFileSystem().du(URL)
    assert contents.state["model"]["large"].shape == (1500, 1000)


def test_a_run_saves_and_loads_at_a_url(store: Any) -> None:
    """The plugin goes by its name, and the whole of a run's state goes through it."""
    with Lite(accelerator="cpu", devices=1, checkpoint="remote") as lite:
        lite.save(URL, {"weights": torch.arange(3.0), "step": 3})
        state = {"weights": torch.zeros(3), "step": 0}
        lite.load(URL, state)
    assert same(state, {"weights": torch.arange(3.0), "step": 3})


@pytest.mark.parametrize("place", ["memory://runs/a", "file://{}/a"])
def test_a_runs_checkpoints_are_kept_at_a_url(store: Any, tmp_path: Path, place: str) -> None:
    """Retention, resuming and renaming damaged checkpoints work at a URL as in a folder."""
    folder = place.format(tmp_path)
    fs = url_to_fs(folder)[0]
    with Lite(accelerator="cpu", devices=1, checkpoint="remote") as lite:
        kept = lite.checkpoints(folder, keep_last=2, keep_best=("loss", "min", 1))
        assert not kept.resume({"weights": torch.zeros(3)})
        for step, loss in enumerate([5.0, 1.0, 4.0, 3.0]):
            assert kept.save(step, {"weights": torch.full((3,), loss)}, {"loss": loss})
        assert _there(fs, folder) == [f"step-{step:012d}.ckpt" for step in (1, 2, 3)]
        assert kept.best() == f"{folder}/step-{1:012d}.ckpt"
        name = next(name for name in fs.find(kept.latest()) if name.endswith(".safetensors"))
        data = bytearray(fs.cat_file(name))
        data[-1] ^= 1
        fs.pipe_file(name, bytes(data))
        found = {"weights": torch.zeros(3)}
        with pytest.warns(
            PlugframeWarning, match="It is renamed to damaged-step-.*, and the checkpoint before it is loaded"
        ):
            assert kept.resume(found)
        assert kept.step == 2
        assert found["weights"].tolist() == [4.0] * 3
        assert _there(fs, folder) == [f"damaged-step-{3:012d}.ckpt", *(f"step-{step:012d}.ckpt" for step in (1, 2))]


def _there(fs: Any, folder: str) -> list[str]:
    return sorted(name.rstrip("/").rpartition("/")[2] for name in fs.ls(folder, detail=False))


def test_a_new_save_takes_the_place_of_the_old_one(remote: RemoteCheckpoint) -> None:
    """After a save the files of the one before are gone, and a tensor still in them is an error, not another value."""
    save(remote, some_state(1))
    before = load(remote)
    save(remote, some_state(2))
    assert same(materialize(load(remote)), some_state(2))
    assert len(names()) == 2
    with pytest.raises(
        CheckpointCorruptError, match=rf"{URL} is incomplete: the file \w+-00000.safetensors is missing"
    ):
        before["model"]["large"].read()


def test_a_loaded_checkpoint_can_be_saved_over_itself(remote: RemoteCheckpoint) -> None:
    """Tensors that still lie in the old checkpoint are read before it goes."""
    save(remote, some_state(1))
    save(remote, load(remote))
    assert same(materialize(load(remote)), some_state(1))


def test_state_without_tensors(remote: RemoteCheckpoint) -> None:
    """A checkpoint may be its manifest alone."""
    save(remote, {"step": 4, "none": None})
    assert names() == ["manifest.json"]
    assert load(remote) == {"step": 4, "none": None}


@pytest.mark.parametrize("lazy", [True, False])
def test_damage_is_told(remote: RemoteCheckpoint, lazy: bool) -> None:
    """A flipped bit anywhere, a file too short, too long or missing: each an error that names the file's URL."""
    save(remote, some_state())
    (data_name,) = (name for name in names() if name != "manifest.json")
    whole = {name: MemoryFileSystem().cat_file(f"{URL}/{name}") for name in names()}
    cases: list[tuple[str, Callable[[bytearray], Any], str]] = [
        (data_name, flip(20), "the header of .* is not what was written.*xxh3 expected"),
        (data_name, flip(-1), "tensor '.*' is not what was written.*xxh3 expected"),
        (data_name, flip(4_000_000), "tensor 'model.large' is not what was written"),
        (data_name, lambda data: data.pop(), "is truncated: expected"),
        (data_name, lambda data: data.append(0), "is longer than what was written"),
        *(("manifest.json", flip(at), "is not what was written") for at in (2, 14, 40, 200, -3)),
        ("manifest.json", lambda data: data.pop(), "is not what was written"),
    ]
    for name, change, message in cases:
        damage(name, change)
        with pytest.raises(CheckpointCorruptError, match=rf"{URL}/{name}.*{message}") as caught:
            load(remote, lazy=lazy)
        assert "\n" not in str(caught.value)
        assert "/tmp" not in str(caught.value)
        MemoryFileSystem().pipe_file(f"{URL}/{name}", whole[name])
    MemoryFileSystem().rm_file(f"{URL}/{data_name}")
    with pytest.raises(CheckpointCorruptError, match=f"{URL} is incomplete: the file {data_name} is missing"):
        load(remote, lazy=lazy)


def test_no_manifest_no_checkpoint(remote: RemoteCheckpoint) -> None:
    """Without its manifest a folder is not complete; without anything it does not exist; a newer one says so."""
    with pytest.raises(CheckpointError, match=rf"^{URL} does not exist\.$"):
        load(remote)
    save(remote, some_state())
    MemoryFileSystem().rm_file(f"{URL}/manifest.json")
    with pytest.raises(CheckpointError, match=f"^{URL} is not complete: it has no manifest.json"):
        load(remote)
    with pytest.raises(CheckpointError, match=f"^{URL} is not complete"):
        remote.inspect(URL)


def test_a_crash_before_the_manifest_leaves_the_old_checkpoint(
    remote: RemoteCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends between its data and the manifest costs nothing, and the next save clears up after it."""
    save(remote, some_state(1))

    def crash(*args: Any, **kwargs: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "mv", crash)
        patch.setattr(MemoryFileSystem, "rm_file", crash)
        with pytest.raises(Crash):
            save(remote, some_state(2))
    assert len(names()) == 4  # a data file and a draft of the manifest are left
    assert same(materialize(load(remote)), some_state(1))
    save(remote, some_state(3))
    assert len(names()) == 2
    assert same(materialize(load(remote)), some_state(3))


@pytest.mark.parametrize("step", ["open", "mv"])
@pytest.mark.parametrize("first", [True, False])
def test_a_failed_save_leaves_nothing_behind(
    remote: RemoteCheckpoint, monkeypatch: pytest.MonkeyPatch, step: str, first: bool
) -> None:
    """An error of the store is one line that names the URL; what was there before stays, and nothing else."""
    if not first:
        save(remote, some_state(1))
    before = names()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the store is\nfull.")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, step, fail)
        message = rf"^cannot write {URL}.*: RuntimeError: the store is full; what was there before is untouched\.$"
        with pytest.raises(CheckpointError, match=message):
            save(remote, some_state(2))
    assert names() == before
    if not first:
        assert same(materialize(load(remote)), some_state(1))


def test_a_store_that_does_and_then_fails_has_done_it(
    remote: RemoteCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest that is in place counts, whatever the store said of it."""
    mv = MemoryFileSystem.mv

    def lose_the_answer(*args: Any, **kwargs: Any) -> None:
        mv(*args, **kwargs)
        raise TimeoutError

    monkeypatch.setattr(MemoryFileSystem, "mv", lose_the_answer)
    save(remote, some_state())
    assert same(materialize(load(remote)), some_state())


def test_data_that_did_not_arrive_is_no_checkpoint(remote: RemoteCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the manifest is written every data file must be there; another job's save may have removed it."""
    save(remote, some_state(1))
    other = RemoteCheckpoint()
    other.checkpoint_setup(context=alone())
    commit = writing.commit

    def meet_another(*args: Any) -> None:
        monkeypatch.setattr(writing, "commit", commit)
        save(other, some_state(2))
        commit(*args)

    monkeypatch.setattr(writing, "commit", meet_another)
    with pytest.raises(CheckpointError, match=f"cannot write {URL}: .* it is missing: is another job saving to it"):
        save(remote, some_state(3))
    assert same(materialize(load(remote)), some_state(2))
    assert len(names()) == 2


def test_a_save_replaces_nothing_that_is_no_checkpoint(remote: RemoteCheckpoint) -> None:
    """A folder with something else in it, and a file, are refused."""
    fs = MemoryFileSystem()
    fs.pipe_file(f"{URL}/notes.txt", b"mine")
    with pytest.raises(CheckpointError, match=rf"^{URL} is a folder that holds something else \(notes.txt\)"):
        save(remote, some_state())
    with pytest.raises(CheckpointError, match=f"^{URL} is a folder, not a checkpoint"):
        load(remote)
    with pytest.raises(CheckpointError, match=f"^{URL}/notes.txt is a file"):
        save(remote, some_state(), f"{URL}/notes.txt")
    with pytest.raises(CheckpointError, match=f"^{URL}/notes.txt is a file"):
        load(remote, f"{URL}/notes.txt")
    assert names() == ["notes.txt"]


def test_a_protocol_nobody_knows(remote: RemoteCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt protocol is met with a similar one, a known one that lacks its package with that package's name."""
    monkeypatch.setitem(
        known_implementations, "faraway", {"class": "no_such_package.Fs", "err": "Install no_such_package to reach it"}
    )
    for act in (load, partial(save, state={}), lambda plugin, url: plugin.inspect(url)):
        with pytest.raises(CheckpointError, match="^memry://x: fsspec has no protocol 'memry'.*memory"):
            act(remote, url="memry://x")
        with pytest.raises(CheckpointError, match=r"^faraway://x/y .*: Install no_such_package to reach it\.$"):
            act(remote, url="faraway://x/y")


def test_a_plain_path_is_the_sharded_checkpoints(remote: RemoteCheckpoint, tmp_path: Path) -> None:
    """A path, and a file:// URL, are written and read as by the sharded checkpoint, which reads copies as well."""
    local = ShardedCheckpoint()
    local.checkpoint_setup(context=alone())
    for number, path in enumerate([str(tmp_path / "plain"), f"file://{tmp_path}/url"]):
        save(remote, some_state(number), path)
        assert same(materialize(load(remote, path)), some_state(number))
        assert same(materialize(load(local, path.removeprefix("file://"))), some_state(number))
        assert remote.inspect(path).num_files == 2
    save(remote, some_state(2))
    MemoryFileSystem().get(URL, str(tmp_path / "copy"), recursive=True)
    assert same(materialize(load(local, str(tmp_path / "copy"))), some_state(2))


# ---------------------------------------------------------------------- two ranks


class Job:
    """One rank of a job, with the plugin set up."""

    def __init__(self, world: World, folder: str, checkpoint: RemoteCheckpoint, context: Context) -> None:
        self.rank = world.global_rank
        self.folder = folder
        self.checkpoint = checkpoint
        self.context = context
        self.mesh: DeviceMesh = init_device_mesh("cpu", (world.world_size,))

    def url(self, name: str) -> str:
        return f"shared://{self.folder}/new/{name}"

    def names(self, name: str) -> list[str]:
        dist.barrier()
        return sorted(os.listdir(f"{self.folder}/new/{name}"))

    def state(self, seed: int) -> dict[str, Any]:
        whole = wholes(seed)
        parts: dict[str, Any] = {
            name: distribute_tensor(whole[name], self.mesh, [Shard(dim)], src_data_rank=None)
            for name, dim in (("rows", 0), ("columns", 1))
        }
        return {**parts, "large": whole["large"], "seed": seed}

    def is_whole(self, name: str, seed: int) -> None:
        """Whole, and as parts of another layout."""
        dist.barrier()
        assert same(load(self.checkpoint, self.url(name), lazy=False), {**wholes(seed), "seed": seed})
        lazy = load(self.checkpoint, self.url(name))
        target = distribute_tensor(torch.zeros(7, 5), self.mesh, [Shard(1)], src_data_rank=None)
        fill([(target, lazy["rows"])])
        wanted = distribute_tensor(wholes(seed)["rows"], self.mesh, [Shard(1)], src_data_rank=None)
        assert isinstance(target, DTensor)
        assert isinstance(wanted, DTensor)
        assert bits(target.to_local()) == bits(wanted.to_local())

    def fails_alike(self, act: Callable[[], Any], message: str, kind: type[Exception] = CheckpointError) -> None:
        with pytest.raises(kind, match=message) as caught:
            act()
        told = self.context.hooks.collective_all_gather_object(obj=str(caught.value), group=None)
        assert len(set(told)) == 1


def wholes(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"rows": (7, 5), "columns": (4, 6), "large": (200, 100)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@contextmanager
def job(folder: str, world: World) -> Iterator[Job]:
    fsspec.register_implementation("shared", SharedStore, clobber=True)
    dist.init_process_group("gloo")
    collective = TorchCollective()
    context = Context(world=world, device=torch.device("cpu"), hooks=hooks_of(collective), names={})
    collective.collective_setup(context=context)
    checkpoint = RemoteCheckpoint()
    checkpoint.checkpoint_setup(context=context)
    try:
        yield Job(world, folder, checkpoint, context)
    finally:
        checkpoint.checkpoint_teardown()
        collective.collective_teardown()
        dist.destroy_process_group()


def round_trip(on: Job) -> None:
    """Each rank writes its part, and any layout can be read."""
    save(on.checkpoint, on.state(1), on.url("a"))
    assert len(on.names("a")) == 3
    on.is_whole("a", 1)


def overwrite(on: Job) -> None:
    """The files of the save before are gone."""
    before = on.names("a")
    save(on.checkpoint, on.state(2), on.url("a"))
    assert set(on.names("a")) & set(before) == {"manifest.json"}
    assert len(on.names("a")) == 3
    on.is_whole("a", 2)


def one_rank_fails(on: Job) -> None:
    """All ranks raise the same, the checkpoint stays, and no file is left; of a first save, no folder."""
    opens = SharedStore.open

    def fail(self: Any, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode == "wb" and on.rank == 1:
            raise PermissionError("no key")
        return opens(self, path, mode, **kwargs)

    before = on.names("a")
    SharedStore.open = fail
    try:
        for name in ("a", "never"):
            url = on.url(name)
            on.fails_alike(
                partial(save, on.checkpoint, on.state(3), url),
                rf"^cannot write {url} \(rank 1\): PermissionError: no key; what was there before is untouched",
            )
    finally:
        SharedStore.open = opens
    assert on.names("a") == before
    assert not os.path.exists(f"{on.folder}/new/never")
    on.is_whole("a", 2)


def manifest_fails(on: Job) -> None:
    """Rank 0 alone writes the manifest, and all raise if it cannot."""
    mv = SharedStore.mv

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("gone away")

    before = on.names("a")
    SharedStore.mv = fail
    try:
        on.fails_alike(partial(save, on.checkpoint, on.state(3), on.url("a")), "OSError: gone away")
    finally:
        SharedStore.mv = mv
    assert on.names("a") == before
    on.is_whole("a", 2)


def damage_is_told_alike(on: Job) -> None:
    """Each rank verifies its share; what one finds, all raise."""
    folder = f"{on.folder}/new/a"
    for rank in (0, 1):
        (name,) = (each for each in on.names("a") if each.endswith(f"-0000{rank}.safetensors"))
        if on.rank == 0:
            shutil.copy(f"{folder}/{name}", f"{on.folder}/kept")
            with open(f"{folder}/{name}", "r+b") as file:
                file.seek(-2, os.SEEK_END)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1]))
        dist.barrier()
        for lazy in (True, False):
            message = rf"^{on.url('a')}/{name}: tensor '\w+' is not what was written"
            on.fails_alike(partial(load, on.checkpoint, on.url("a"), lazy=lazy), message, CheckpointCorruptError)
        if on.rank == 0:
            os.replace(f"{on.folder}/kept", f"{folder}/{name}")
        dist.barrier()
    on.is_whole("a", 2)


def parts_that_do_not_match(on: Job) -> None:
    """Ranks that save parts of different tensors are told so, and nothing is written."""
    key = "rows" if on.rank == 0 else "lines"
    state = {key: on.state(1)["rows"]}
    on.fails_alike(partial(save, on.checkpoint, state, on.url("other")), "is a part of shape .* on rank 0 and missing")
    on.fails_alike(partial(load, on.checkpoint, on.url("other")), "does not exist")
    assert not os.path.exists(f"{on.folder}/new/other")


def plain_path(on: Job) -> None:
    """A path is written by the sharded checkpoint, by all ranks."""
    path = f"{on.folder}/plain"
    save(on.checkpoint, on.state(4), path)
    dist.barrier()
    assert same(load(on.checkpoint, path, lazy=False), {**wholes(4), "seed": 4})


CHECKS = [
    round_trip,
    overwrite,
    one_rank_fails,
    manifest_fails,
    damage_is_told_alike,
    parts_that_do_not_match,
    plain_path,
]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the failure of each check, by name; one job runs all of them."""
    return run_checks(2, partial(job, str(tmp_path_factory.mktemp("shared"))), CHECKS)


@pytest.mark.parametrize("check", [each.__name__ for each in CHECKS])
def test_two_ranks(two_ranks: dict[str, str], check: str) -> None:
    """The rule in the check's docstring holds on both of two gloo ranks."""
    assert not two_ranks[check], two_ranks[check]
