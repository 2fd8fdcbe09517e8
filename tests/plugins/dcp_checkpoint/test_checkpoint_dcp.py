"""The sharded checkpoint: a folder that every rank writes a part of, read again by any number of ranks."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from checkpoint_trees import bits, random_tensor, same, trees
from paths import HELPERS
from plugframe.checkpoint import StoredTensor, fill, materialize, open_locked, seal
from plugframe.errors import CheckpointCorruptError, CheckpointError
from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins._shared.checkpoint_files import tensor_file
from plugframe_builtins._shared.sharded_checkpoint import torch_writer
from plugframe_builtins._shared.sharded_checkpoint.pending import Pending
from plugframe_builtins.dcp_checkpoint.checkpoint import ShardedCheckpoint
from plugframe_builtins.safetensors_checkpoint.checkpoint import SafetensorsCheckpoint
from plugframe_builtins.single.one_rank import OneRank
from plugframe_builtins.torch_collective.collective import TorchCollective
from ranks import RanksFailed, hooks_of, run_checks, run_ranks

#: Dtype and shape of each tensor of the state that all jobs save and load.
SHAPES: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "rows": (torch.float32, (8, 6)),
    "columns": (torch.bfloat16, (6, 10)),
    "uneven": (torch.float32, (7, 3)),
    "few": (torch.float64, (1, 5)),
    "flat": (torch.float16, (13,)),
    "complex": (torch.complex64, (5, 4)),
    "narrow": (torch.float8_e4m3fnuz, (6, 4)),
    "deep": (torch.int64, (3, 5, 4)),
    "empty": (torch.float32, (0, 4)),
    "replica": (torch.float32, (3, 3)),
    "large": (torch.float32, (200, 100)),
}


def wholes() -> dict[str, Tensor]:
    """The values of every tensor, the same in every process."""
    return {name: random_tensor(*how, seed) for seed, (name, how) in enumerate(SHAPES.items())}


def spread(tensor: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    """This rank's part, without asking the other ranks."""
    # Some dtypes cannot be split by torch's own distribution: their bytes can, along the leading dimensions.
    raw = tensor if tensor.dtype in (torch.float32, torch.float64) else _bytes(tensor)
    part = distribute_tensor(raw, mesh, placements, src_data_rank=None)
    if raw is tensor:
        return part
    local = part.to_local().contiguous().view(tensor.dtype).reshape(*part.to_local().shape[:-1])
    stride = torch.empty(tensor.shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=stride)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(*tensor.shape, 1).view(torch.uint8)


class Job:
    """One rank of a job, with the plugin set up."""

    def __init__(self, world: World, folder: str, checkpoint: Any, meshes: dict[str, DeviceMesh]) -> None:
        self.world = world
        self.folder = folder
        self.checkpoint = checkpoint
        self.meshes = meshes

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def save(self, name: str, state: dict[str, Any], *, wait: bool = True) -> Any:
        return self.checkpoint.checkpoint_save(path=self.path(name), state=state, info={"saved": "by"}, wait=wait)

    def load(self, name: str, *, lazy: bool = True, trusted: bool = False) -> dict[str, Any]:
        state: dict[str, Any] = self.checkpoint.checkpoint_load(path=self.path(name), trusted=trusted, lazy=lazy)
        return state

    def meet(self) -> None:
        """Wait for the other ranks."""
        if self.world.world_size > 1:
            dist.barrier()

    def names(self, name: str) -> list[str]:
        return sorted(os.listdir(self.path(name)))

    def parts(self, how: str) -> dict[str, Any]:
        """The state as this rank has it: "one" mesh dimension, sharded by rows or columns, or a "grid" of two."""
        values = wholes()
        mesh = self.meshes["line" if how in ("rows", "columns") else "grid"]
        places: tuple[Placement, ...] = {
            "rows": (Shard(0),),
            "columns": (Shard(1),),
            "grid": (Shard(0), Shard(1)),
            "hybrid": (Replicate(), Shard(0)),
        }[how]
        state: dict[str, Any] = {}
        for name, value in values.items():
            if name in ("large",):
                state[name] = value
                continue
            here = (Replicate(),) * len(places) if name == "replica" else places
            here = tuple(Shard(0) if isinstance(p, Shard) and p.dim >= value.dim() else p for p in here)
            state[name] = spread(value, mesh, *here)
        return state


@contextmanager
def job(folder: str, world: World) -> Iterator[Job]:
    """Set the plugin up over real gloo ranks, or for one rank without any group."""
    if world.world_size == 1:
        hooks = hooks_of(OneRank())
        meshes: dict[str, DeviceMesh] = {}
    else:
        dist.init_process_group("gloo")
        collective = TorchCollective()
        hooks = hooks_of(collective)
        meshes = {"line": init_device_mesh("cpu", (world.world_size,))}
        if world.world_size % 2 == 0:
            meshes["grid"] = init_device_mesh("cpu", (2, world.world_size // 2))
    context = Context(world=world, device=torch.device("cpu"), hooks=hooks, names={"checkpoint": "dcp"})
    if world.world_size > 1:
        collective.collective_setup(context=context)
    checkpoint = ShardedCheckpoint()
    checkpoint.checkpoint_setup(context=context)
    try:
        yield Job(world, folder, checkpoint, meshes)
    finally:
        checkpoint.checkpoint_teardown()
        if world.world_size > 1:
            collective.collective_teardown()
            dist.destroy_process_group()


def flip(path: str, at: int) -> None:
    """Flip a bit of a file, counted from its end if negative."""
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def state_of(on: Job, how: str) -> dict[str, Any]:
    parts = on.parts(how)
    again = {"rows": parts["rows"]}
    return {"model": parts, "twin": parts["few"], "again": again, "step": 7, "scale": torch.tensor(2.5)}


def check_content(on: Job, name: str) -> None:
    """Everything comes back, whole and in every layout this job can spread it in."""
    values = wholes()
    eager = on.load(name, lazy=False)
    assert same(eager["model"], values)
    assert same(eager["twin"], values["few"])
    assert eager["step"] == 7
    assert eager["scale"] == 2.5
    lazy = on.load(name)
    assert same(materialize(lazy), eager)
    for how in ("rows", "columns", *(("grid", "hybrid") if "grid" in on.meshes else ())) if on.meshes else ():
        wanted = on.parts(how)
        targets = {key: _blank(value) for key, value in wanted.items()}
        fill([(targets[key], lazy["model"][key]) for key in targets])
        for key, target in targets.items():
            assert bits(_local(target)) == bits(_local(wanted[key])), f"{key} as {how}"


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _blank(value: Tensor) -> Tensor:
    if not isinstance(value, DTensor):
        return torch.zeros_like(value)
    local = torch.zeros(value.to_local().shape, dtype=torch.uint8).to(value.dtype)
    return DTensor.from_local(
        local, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


# ---------------------------------------------------------------------- any number of ranks


def saves_in_every_layout(on: Job) -> None:
    """Rows, columns, a grid and replicas are each saved once and load in each other layout."""
    for how in ("rows", "columns", *(("grid", "hybrid") if "grid" in on.meshes else ())):
        name = f"{on.world.world_size}-{how}"
        on.save(name, state_of(on, how))
        check_content(on, name)
        assert sum(os.path.getsize(os.path.join(on.path(name), each)) for each in on.names(name)) < 120_000


def loads_from_4(on: Job) -> None:
    """What four ranks saved has the same values here."""
    check_content(on, "4-grid")


def loads_from_2(on: Job) -> None:
    """What two ranks saved has the same values here."""
    check_content(on, "2-columns")


def loads_from_1(on: Job) -> None:
    """What one rank saved has the same values here."""
    check_content(on, "1-whole")


def test_any_number_of_ranks_loads_what_any_other_saved(tmp_path: Path) -> None:
    """Saved on 4 ranks, loaded and saved on 2, then on 1, then on 3: every value is the same to the last bit."""
    for num_ranks, checks in ((4, [saves_in_every_layout]), (2, [loads_from_4, saves_in_every_layout])):
        report = run_checks(num_ranks, partial(job, str(tmp_path)), checks)
        assert not any(report.values()), "\n".join(report.values())
    with job(str(tmp_path), World()) as alone:
        check_content(alone, "2-columns")
        check_content(alone, "4-hybrid")
        alone.save("1-whole", alone.load("2-rows", lazy=False))
    report = run_checks(3, partial(job, str(tmp_path)), [loads_from_1, loads_from_2, saves_in_every_layout])
    assert not any(report.values()), "\n".join(report.values())


# ---------------------------------------------------------------------- two ranks


@contextmanager
def disk_full(on: Job, *, rank: int) -> Iterator[None]:
    """Let writing fail on one rank, half-way."""

    def failing(file: Any, tensors: Any) -> Any:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if on.world.global_rank == rank:
            patch.setattr(tensor_file, "write_tensors", failing)
        yield


def numbered(on: Job, number: int) -> dict[str, Any]:
    value = torch.full((64, 400), float(number))
    return {"part": distribute_tensor(value, on.meshes["line"], [Shard(0)], src_data_rank=None), "number": number}


def check_number(on: Job, name: str, number: int) -> None:
    state = on.load(name, lazy=False)
    assert state["number"] == number
    assert (state["part"] == number).all()
    files = on.names(name)
    assert len(files) == 3, files


FULL = r"cannot write .*{name} \(rank 1\): No space left on device; what was there before is untouched"


def a_failure_is_the_same_on_all_ranks(on: Job) -> None:
    """A disk full on one rank is one error on all; the old checkpoint stays, and of a new one nothing."""
    on.save("failing", numbered(on, 1))
    for name in ("failing", "never"):
        with disk_full(on, rank=1), pytest.raises(CheckpointError, match=FULL.format(name=name)):
            on.save(name, numbered(on, 2))
        on.meet()
    check_number(on, "failing", 1)
    assert not os.path.exists(on.path("never"))
    on.meet()
    on.save("failing", numbered(on, 3))
    check_number(on, "failing", 3)


def what_is_saved_behind_is_what_was_at_the_call(on: Job) -> None:
    """The loop may change every tensor as soon as the call returns."""
    for number in (1, 2, 3):
        state = {**numbered(on, number), "whole": torch.full((300, 100), float(number)), "x": torch.tensor(number)}
        handle = on.save("behind", state, wait=False)
        for value in state.values():
            if isinstance(value, Tensor):
                _local(value).fill_(-1)
        handle.wait()
        assert handle.done()
        loaded = on.load("behind", lazy=False)
        assert (loaded["part"] == number).all()
        assert (loaded["whole"] == number).all()
        assert loaded["x"] == number


def a_failure_behind_is_raised_once_at_the_next_call(on: Job) -> None:
    """Whatever the next call is, it raises on all ranks; the one after goes on, and the old checkpoint is there."""
    on.save("error", numbered(on, 1))
    calls: list[Callable[[], object]] = [
        lambda: on.save("error", numbered(on, 3)),
        lambda: on.load("error"),
        lambda: on.checkpoint.checkpoint_teardown(),
    ]
    for call in calls:
        with disk_full(on, rank=1):
            handle = on.save("error", numbered(on, 2), wait=False)
            with suppress(CheckpointError):
                handle._end()
        with pytest.raises(CheckpointError, match=FULL.format(name="error")):
            call()
        on.meet()
        check_number(on, "error", 1)
    with disk_full(on, rank=1):
        handle = on.save("error", numbered(on, 2), wait=False)
        with pytest.raises(CheckpointError, match=FULL.format(name="error")):
            handle.wait()
    on.save("error", numbered(on, 4))
    check_number(on, "error", 4)


def told_to_one_rank_alone(on: Job) -> None:
    """If only one rank has asked for the error, the next call tells all of them, and none is left waiting."""
    with disk_full(on, rank=1):
        handle = on.save("alone", numbered(on, 2), wait=False)
        if on.world.global_rank == 0:
            with pytest.raises(CheckpointError, match=FULL.format(name="alone")):
                handle.wait()
        with pytest.raises(CheckpointError, match=FULL.format(name="alone")):
            on.save("alone", numbered(on, 3))
    on.save("alone", numbered(on, 4))
    check_number(on, "alone", 4)


def the_next_save_and_the_end_wait(on: Job) -> None:
    """A save in the background is over before the next begins, and before tear-down ends."""
    for call in (lambda: on.save("second", numbered(on, 2)), lambda: on.checkpoint.checkpoint_teardown()):
        go_on = threading.Event()
        write = tensor_file.write_tensors
        look = Pending.unreported

        def held(file: Any, tensors: Any, go_on: Any = go_on, write: Any = write) -> Any:
            assert go_on.wait(60)
            return write(file, tensors)

        def looked(pending: Any, go_on: Any = go_on, look: Any = look) -> Any:
            go_on.set()
            return look(pending)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensor_file, "write_tensors", held)
            patch.setattr(Pending, "unreported", looked)
            handle = on.save("first", numbered(on, 1), wait=False)
            assert not handle.done()
            call()
        assert handle.done()
        handle.wait()
        on.meet()
        check_number(on, "first", 1)


def what_differs_is_rank_0s(on: Job) -> None:
    """Plain values and plain tensors that are not the same on all ranks are those of rank 0."""
    rank = on.world.global_rank
    state = {"n": rank, "small": torch.tensor(rank), "large": torch.full((200 + rank, 100), float(rank))}
    if rank == 1:
        state["more"] = torch.zeros(300, 100)
    on.save("differing", state)
    wanted = {"n": 0, "small": torch.tensor(0), "large": torch.zeros(200, 100)}
    assert same(on.load("differing", lazy=False), wanted)


def parts_of_different_tensors_are_refused(on: Job) -> None:
    """A tensor that is sharded on one rank and missing on another is an error that names it on all ranks."""
    state = numbered(on, 1)
    if on.world.global_rank == 1:
        state["other"] = state.pop("part")
    with pytest.raises(
        CheckpointError, match=r"'part' is a part of shape \(64, 400\) and torch\.float32 on rank 0 and m"
    ):
        on.save("unequal", state)
    assert not os.path.exists(on.path("unequal"))


def a_state_that_cannot_be_saved_is_refused_on_all_ranks(on: Job) -> None:
    """What one rank cannot save, by key, is an error on all of them."""
    bad = {"f": print} if on.world.global_rank == 1 else {"f": 1}
    with pytest.raises(CheckpointError, match=r"state\['f'\] is a builtin_function_or_method"):
        on.save("code", bad)
    partial_sum = DTensor.from_local(torch.ones(2), on.meshes["line"], [Partial()], run_check=False)
    with pytest.raises(CheckpointError, match=r"state\['p'\] is a DTensor with .* save state\['p'\]\.full_tensor"):
        on.save("code", {"p": partial_sum})


def damage_is_told_to_all_ranks(on: Job) -> None:
    """Each rank verifies a share; what one finds, all raise, with the file and the tensor."""
    on.save("damaged", numbered(on, 1))
    on.meet()
    file = sorted(name for name in on.names("damaged") if name.endswith("-00001.safetensors"))[0]
    if on.world.global_rank == 0:
        flip(os.path.join(on.path("damaged"), file), -5)
    on.meet()
    for lazy in (True, False):
        with pytest.raises(CheckpointCorruptError, match=rf"{file}: tensor 'part' is not what was written: bytes"):
            on.load("damaged", lazy=lazy)


def a_single_file_is_read_in_parts(on: Job) -> None:
    """Both plugins read both forms lazily: a part of a tensor, in another dtype, from one safetensors file."""
    single = SafetensorsCheckpoint()
    single.checkpoint_setup(context=on.checkpoint.context)
    values = wholes()
    single.checkpoint_save(path=on.path("single"), state={"model": values}, info={}, wait=True)
    on.save("folder", {"model": on.parts("rows")})
    save_file({"rows": values["rows"]}, on.path("plain")) if on.world.global_rank == 0 else None
    on.meet()
    for plugin in (single, on.checkpoint):
        for name in ("single", "folder", "plain"):
            state = plugin.checkpoint_load(path=on.path(name), trusted=False, lazy=True)
            stored = state["rows"] if name == "plain" else state["model"]["rows"]
            assert isinstance(stored, StoredTensor)
            target = distribute_tensor(torch.zeros(8, 6), on.meshes["line"], [Shard(1)], src_data_rank=None)
            target = target.to(torch.bfloat16)
            fill([(target, stored)])
            wanted = spread(values["rows"], on.meshes["line"], Shard(1)).to_local().to(torch.bfloat16)
            assert bits(target.to_local()) == bits(wanted)


def folders_of_torch_itself_are_read(on: Job) -> None:
    """A folder of torch.distributed.checkpoint is read, trusted or not; never written over."""
    values = wholes()
    state = {"model": {"rows": on.parts("rows")["rows"], "whole": values["few"]}, "list": [1, {"a": 2.5}], "epoch": 3}
    dcp.save(dict(state), checkpoint_id=on.path("torch"))
    for trusted in (False, True):
        loaded = on.load("torch", trusted=trusted)
        assert same(loaded["model"], {"rows": values["rows"], "whole": values["few"]})
        assert loaded["list"] == [1, {"a": 2.5}]
        assert loaded["epoch"] == 3
    with pytest.raises(CheckpointError, match=r"is a folder that holds something else \(\.metadata, "):
        on.save("torch", numbered(on, 1))


def torchs_layout_is_read_by_torch_and_here(on: Job) -> None:
    """Shards saved with layout="torch" load in any other layout, by plugframe and by torch; also behind the loop."""
    on.checkpoint.layout = "torch"
    try:
        for how, wait in (("rows", True), ("hybrid", True), ("columns", False)):
            handle = on.save("theirs", state_of(on, how), wait=wait)
            if handle is not None:
                handle.wait()
            check_content(on, "theirs")
            wanted = on.parts("grid" if how == "rows" else "rows")
            targets = {key: _blank(value) for key, value in wanted.items() if key != "narrow"}
            dcp.load({"model": targets}, checkpoint_id=on.path("theirs"))
            for key, target in targets.items():
                assert bits(_local(target)) == bits(_local(wanted[key])), f"{key} from {how}"
        with disk_full_for_metadata(), pytest.raises(CheckpointError, match="No space left on device; what was there"):
            on.save("theirs", state_of(on, "rows"))
        on.meet()
        check_content(on, "theirs")
    finally:
        on.checkpoint.layout = "plugframe"
    on.save("theirs", numbered(on, 1))
    check_number(on, "theirs", 1)


@contextmanager
def disk_full_for_metadata() -> Iterator[None]:
    """Let the metadata of torch fail to be written."""

    def failing(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_writer, "_metadata", failing)
        yield


CHECKS = [
    a_failure_is_the_same_on_all_ranks,
    what_is_saved_behind_is_what_was_at_the_call,
    a_failure_behind_is_raised_once_at_the_next_call,
    told_to_one_rank_alone,
    the_next_save_and_the_end_wait,
    what_differs_is_rank_0s,
    parts_of_different_tensors_are_refused,
    a_state_that_cannot_be_saved_is_refused_on_all_ranks,
    damage_is_told_to_all_ranks,
    a_single_file_is_read_in_parts,
    folders_of_torch_itself_are_read,
    torchs_layout_is_read_by_torch_and_here,
]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run every check on two ranks of one job."""
    return run_checks(2, partial(job, str(tmp_path_factory.mktemp("two"))), CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_ranks(check: Callable[[Any], None], on_two_ranks: dict[str, str]) -> None:
    """The rule in the check's docstring holds on both of two gloo ranks."""
    assert not on_two_ranks[check.__name__], on_two_ranks[check.__name__]


# ---------------------------------------------------------------------- one rank


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Job]:
    """A job of one rank, without a process group."""
    with job(str(tmp_path), World()) as made:
        yield made


def small(number: int = 0) -> dict[str, Any]:
    return {"model": {"w": torch.full((50, 7), float(number)), "b": torch.arange(9)}, "number": number}


def data_file(on: Job, name: str) -> str:
    (found,) = [each for each in on.names(name) if each.endswith(".safetensors")]
    return os.path.join(on.path(name), found)


@given(state=trees())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_state_comes_back_as_it_was(alone: Job, state: dict[Any, Any]) -> None:
    """Types, orders of keys, strides and bits of whatever can be saved, at once and behind, whole and in parts."""
    alone.save("any", state)
    assert same(alone.load("any", lazy=False), state)
    handle = alone.save("any", state, wait=False)
    handle.wait()
    assert same(materialize(alone.load("any")), state)


def test_a_checkpoint_is_a_manifest_and_files_other_tools_read(alone: Job) -> None:
    """A save over a checkpoint leaves the manifest and one file, which is a safetensors file; nothing is a pickle."""
    for number in (1, 2):
        alone.save("last", small(number))
        assert len(alone.names("last")) == 2
    tensors = load_file(data_file(alone, "last"))
    assert same(tensors["model.w"], small(2)["model"]["w"])
    assert same(tensors["model.b"], small(2)["model"]["b"])
    manifest = json.loads(Path(alone.path("last"), "manifest.json").read_text())
    assert manifest["format"] == "plugframe sharded"
    assert manifest["structure"]["dict"]["number"] == 2
    contents = alone.checkpoint.inspect(alone.path("last"))
    assert contents.info == {"saved": "by"}
    assert contents.size_bytes == sum(os.path.getsize(os.path.join(alone.path("last"), n)) for n in alone.names("last"))


def test_every_flipped_bit_is_found(alone: Job) -> None:
    """No byte of any file can change unseen; the error names the file, and the tensor if it is in one."""
    alone.save("last", {"w": torch.arange(20.0), "n": 3})
    for name in alone.names("last"):
        path = os.path.join(alone.path("last"), name)
        for at in range(0, os.path.getsize(path), 3):
            flip(path, at)
            for lazy in (True, False):
                with pytest.raises(CheckpointError, match=name if name != "manifest.json" else "last") as caught:
                    alone.load("last", lazy=lazy)
            assert name == "manifest.json" or "'w'" in str(caught.value) or "the header" in str(caught.value)
            flip(path, at)
    assert alone.load("last")["n"] == 3


def test_missing_cut_and_newer_files_are_named(alone: Job) -> None:
    """A file that is gone, cut off, longer or swapped, and a later format, are each told apart."""
    alone.save("last", small())
    path = data_file(alone, "last")
    name = os.path.basename(path)
    content = Path(path).read_bytes()
    manifest = Path(alone.path("last"), "manifest.json")
    for data, text in (
        (None, rf"last is incomplete: the file {name} is missing"),
        (content[:-1], rf"{name} is truncated: expected {len(content)} bytes, found {len(content) - 1}"),
        (content + b"a", rf"{name} is longer than what was written"),
        (bytes(len(content)), rf"{name}: tensor '.*' is not what was written: .* xxh3 expected"),
    ):
        os.unlink(path)
        if data is not None:
            Path(path).write_bytes(data)
        else:
            with pytest.raises(CheckpointCorruptError, match=text):
                alone.load("last")
            Path(path).touch()
            continue
        for lazy in (True, False):
            with pytest.raises(CheckpointCorruptError, match=text):
                alone.load("last", lazy=lazy)
    Path(path).write_bytes(content)
    body = json.loads(manifest.read_text())
    del body["xxh3"]
    manifest.write_bytes(seal({**body, "version": 2}))
    with pytest.raises(CheckpointError, match=r"last was written by a newer plugframe \(format 2, this one reads 1\)"):
        alone.load("last")
    manifest.write_bytes(seal({**body, "files": {"../a": [1, 1, "0"]}}))
    with pytest.raises(CheckpointCorruptError, match=r"it is not a manifest: .*a name no data file has"):
        alone.load("last")
    manifest.unlink()
    with pytest.raises(CheckpointError, match=r"last is not complete: it has no manifest\.json, which is written last"):
        alone.load("last")


def test_what_is_in_the_way_is_refused(alone: Job, tmp_path: Path) -> None:
    """A file, and a folder that holds something else, stay what they are, and the error says what to type."""
    (tmp_path / "file").write_text("a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("a")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text("{}")
    for name, text in (
        ("file", r"file is a file that is not a checkpoint, and a sharded checkpoint is a folder: give another name"),
        ("folder", r"holds something else \(notes\.txt\): give a new folder, such as '.*folder/last'"),
        ("other", r"holds something else \(manifest\.json\)"),
    ):
        with pytest.raises(CheckpointError, match=text):
            alone.save(name, small())
    assert (tmp_path / "file").read_text() == "a"
    assert os.listdir(tmp_path / "folder") == ["notes.txt"]
    with pytest.raises(CheckpointError, match=r"other is a folder, but its manifest\.json is not one of a checkpoint"):
        alone.load("other")
    with pytest.raises(CheckpointError, match=r"'s3://a/b' is not a file system path"):
        alone.checkpoint.checkpoint_save(path="s3://a/b", state={}, info={}, wait=True)


def test_a_checkpoint_of_the_other_form_is_replaced(alone: Job, tmp_path: Path) -> None:
    """A file takes the place of a folder at one path, and a folder that of a file, whole; nothing stays beside them."""
    single = SafetensorsCheckpoint()
    single.checkpoint_setup(alone.checkpoint.context)
    path = alone.path("last")
    for number, wait in ((0, True), (1, False)):
        single.checkpoint_save(path=path, state=small(number), info={}, wait=True)
        assert os.path.isfile(path)
        assert same(materialize(alone.load("last")), small(number))
        alone.save("last", small(number + 5), wait=wait)
        assert same(materialize(alone.load("last")), small(number + 5))
        assert os.path.isdir(path)
    assert os.listdir(tmp_path) == ["last"]


def test_a_swap_that_fails_leaves_the_old_one(alone: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system cannot exchange a file and a folder, what was there stays, and no stump is left."""

    def refuse(first: str, second: str) -> None:
        raise OSError(errno.EINVAL, "this file system cannot exchange a file and a folder atomically")

    monkeypatch.setattr("plugframe.checkpoint.atomic.exchange", refuse)
    monkeypatch.setattr("plugframe_builtins._shared.sharded_checkpoint.writer.exchange", refuse)
    single = SafetensorsCheckpoint()
    single.checkpoint_setup(alone.checkpoint.context)
    alone.save("folder", small(1))
    single.checkpoint_save(path=alone.path("file"), state=small(1), info={}, wait=True)
    with pytest.raises(CheckpointError, match="cannot write .*folder: this file system cannot exchange a file"):
        single.checkpoint_save(path=alone.path("folder"), state=small(2), info={}, wait=True)
    with pytest.raises(CheckpointError, match="cannot write .*file: this file system cannot exchange a file"):
        alone.save("file", small(2))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    for name in ("file", "folder"):
        assert same(materialize(alone.load(name)), small(1))


def test_a_full_disk_is_known_before_anything_is_written(alone: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for all files nothing is written, and no folder is made."""
    alone.save("last", small(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    for name in ("last", "never"):
        with pytest.raises(
            CheckpointError, match=rf"cannot write .*{name}: it needs \d+ bytes and .* has 10 bytes free"
        ):
            alone.save(name, small(2))
    monkeypatch.undo()
    assert alone.load("last")["number"] == 1
    assert len(alone.names("last")) == 2
    assert not os.path.exists(alone.path("never"))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_error_at_any_step_leaves_the_old_one(alone: Job, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """An error of the file system is ours, with its reason; the old checkpoint stays, without leftovers."""
    alone.save("last", small(1))

    def failing(*args: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    for wait in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, failing)
            with pytest.raises(CheckpointError, match=r"cannot write .*last.*: Input/output error; what was there"):
                (alone.save("last", small(2), wait=wait) or SimpleNamespace(wait=int)).wait()
        assert alone.load("last")["number"] == 1
        assert len(alone.names("last")) == 2


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(alone: Job) -> None:
    """A file nobody has locked is removed by the next save; one that is being written is not."""
    alone.save("last", small(1))
    dead, living = (os.path.join(alone.path("last"), f"{digit * 16}-00000.safetensors") for digit in "ab")
    Path(dead).write_bytes(b"half")
    file = open_locked(living)
    assert file is not None
    with file:
        alone.save("last", small(2))
        assert os.path.exists(living)
        assert not os.path.exists(dead)
    alone.save("last", small(3))
    assert len(alone.names("last")) == 2


def test_what_is_being_loaded_is_not_taken_away(alone: Job) -> None:
    """Tensors that were found in a checkpoint are read from it, though another has taken its place meanwhile."""
    alone.save("last", small(1))
    state = alone.load("last")
    alone.save("last", small(2))
    assert same(materialize(state), small(1))


def test_a_large_tensor_is_read_piece_by_piece(alone: Job) -> None:
    """Columns, rows and the whole of a tensor of several segments come out right, in little memory."""
    whole = torch.arange(3000 * 3000, dtype=torch.float32).view(3000, 3000)
    alone.save("large", {"w": whole})
    stored = alone.load("large")["w"]
    assert torch.equal(stored.read(), whole)
    target = torch.zeros(3000, 3000, dtype=torch.float64)
    fill([(target, stored)])
    assert torch.equal(target, whole.double())
    turned = torch.zeros(3000, 3000).t()
    fill([(turned, stored)])
    assert torch.equal(turned, whole)
    with pytest.raises(CheckpointError, match=r"large does not fit what it is loaded into: Size mismatch"):
        fill([(torch.zeros(3), stored)])


# ---------------------------------------------------------------------- killed


def saves_until_it_is_killed(world: World, folder: str, victims: list[int], delay_s: float, wait: bool) -> None:
    """Save one number after another; the victims' processes end at once, at some moment."""
    with job(folder, world) as on:
        on.save("last", numbered(on, 0))
        on.meet()
        if world.global_rank in victims:
            threading.Thread(target=_die, args=(delay_s,), daemon=True).start()
        for number in itertools.count(1):
            on.save("last", numbered(on, number), wait=wait)


def _die(delay_s: float) -> None:
    threading.Event().wait(delay_s)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("victims", "wait"), [([0], True), ([1], False), ([0, 1], False)])
def test_a_killed_save_leaves_the_old_or_the_new_one(tmp_path: Path, victims: list[int], wait: bool) -> None:
    """Whichever rank dies, whenever: one whole checkpoint is there, and the next save clears up."""
    with pytest.raises(RanksFailed):
        run_ranks(2, saves_until_it_is_killed, str(tmp_path), victims, random.uniform(0, 0.2), wait, timeout_s=30)
    with job(str(tmp_path), World()) as alone:
        state = alone.load("last", lazy=False)
        assert (state["part"] == state["number"]).all()
        alone.save("last", small(5))
        assert len(alone.names("last")) == 2
        assert alone.load("last")["number"] == 5


# One process imports torch and forks the victims: starting one for each kill would cost seconds each.
_VICTIMS = """
import itertools, json, os, random, select, signal, sys
os.environ["OMP_NUM_THREADS"] = "1"  # a forked child would wait for threads it does not have
sys.path[:0] = TESTS
import torch
from plugframe.hooks.world import World
from test_checkpoint_dcp import job

FOLDER = TARGET

def save(on, version, numel, wait=True):
    state = {"model": {"w": torch.full((numel,), float(version)), "b": torch.tensor(version)}, "version": version}
    handle = on.save("last", state, wait=wait)
    if handle is not None:
        handle.wait()

def version(on):
    state = on.load("last", lazy=False)
    found = state["version"]
    assert state["model"]["b"] == found and (state["model"]["w"] == found).all(), "a mixture was loaded"
    return found

def killed_at_random(on, wait):
    ready, tell = os.pipe()
    victim = os.fork()
    if victim == 0:
        for number in itertools.count():
            save(on, number % 2, 2_000_000, wait)
            os.write(tell, b".")
    os.read(ready, 1)
    select.select([], [], [], random.uniform(0, 0.1))
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    return version(on)

def die_at_line(on, wanted):
    seen = 0
    def trace(frame, event, argument):
        nonlocal seen
        if not frame.f_code.co_filename.endswith(("atomic.py", "tensor_file.py", "writer.py", "folder.py")):
            return None
        seen += event == "line"
        if seen == wanted:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    save(on, 1, 100)
    os._exit(0)

def killed_at_lines(on, step):
    for wanted in itertools.count(1, step):
        save(on, 0, 100)
        assert len(on.names("last")) == 2, on.names("last")
        victim = os.fork()
        if victim == 0:
            die_at_line(on, wanted)
        if os.waitpid(victim, 0)[1] == 0:
            return
        yield version(on)

with job(FOLDER, World()) as on:
    save(on, 0, 100)
    random_kills = [killed_at_random(on, wait) for wait in (True, False) for _ in range(KILLS)]
    line_kills = list(killed_at_lines(on, 7))
    save(on, 0, 100)
    print(json.dumps({"random": random_kills, "lines": line_kills, "left": len(on.names("last"))}))
"""


def test_a_process_killed_at_any_line_of_a_save(tmp_path: Path, run_python: Callable[[str], str]) -> None:
    """The old one until the manifest is replaced, the new one from then on; and the next save clears up."""
    code = _VICTIMS.replace("TESTS", repr([str(Path(__file__).parent), str(HELPERS)])).replace(
        "TARGET", repr(str(tmp_path))
    )
    found = json.loads(run_python("import os; os.environ['OMP_NUM_THREADS'] = '1'\n" + code.replace("KILLS", "5")))
    assert set(found["random"]) <= {0, 1}
    assert len(found["lines"]) > 30
    assert found["lines"] == sorted(found["lines"])
    assert set(found["lines"]) == {0, 1}
    assert found["left"] == 2
