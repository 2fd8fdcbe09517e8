"""Seeds of ranks, worker processes and datasets with their own generators."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info, random_split

from plugframe import Lite, OutOfSyncError, SettingError, seed_everything
from plugframe.data.generators import find_generators
from plugframe.data.random_check import RandomStreamCheck
from plugframe.data.seed import GLOBAL_SEED, JOB_SEED, PROCESS, seed_process
from plugframe.data.shared_seed import SharedSeed
from plugframe.hooks.world import World
from plugframe.lite.setup import draw_apart
from ranks import run_checks

MODULE_LEVEL = numpy.random.default_rng(0)


@pytest.fixture(autouse=True)
def _same_generators() -> Iterator[None]:
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state(), dict(vars(PROCESS))
    yield
    torch.set_rng_state(before[0])
    random.setstate(before[1])
    numpy.random.set_state(before[2])
    vars(PROCESS).update(before[3])


# ------------------------------------------------------------------ what a seed is


@pytest.mark.parametrize("seed", [42, "42", numpy.int64(42), numpy.uint8(42)])
def test_any_integer_and_its_digits_are_a_seed(seed: Any) -> None:
    """NumPy integers and digits from a command line are converted to an int."""
    assert type(seed_everything(seed)) is int
    first = torch.rand(()).item()
    assert seed_everything(42) == 42
    assert torch.rand(()).item() == first


@pytest.mark.parametrize(
    "seed", [-1, 2**32, True, numpy.bool_(True), 1.0, "", "-1", "1.5", "one", "٣", "9" * 5000, torch.tensor(1), [1]]
)
def test_what_is_no_integer_is_no_seed(seed: Any) -> None:
    """Booleans, floats, negative numbers and other strings are refused."""
    with pytest.raises(SettingError, match="is not a seed: pass an integer from 0 to 4294967295"):
        seed_everything(seed)
    with pytest.raises(SettingError, match="per_rank=1 of seed_everything"):
        seed_everything(1, per_rank=1)  # type: ignore[arg-type]


def test_without_a_seed_the_environment_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes with the same job variables draw one seed; others draw different ones."""
    for name in (GLOBAL_SEED, JOB_SEED, "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert seed_everything() != seed_everything()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "1234")
    met = seed_everything()
    assert met == seed_everything()
    monkeypatch.setenv(JOB_SEED, "abc")
    assert met != seed_everything() == seed_everything()
    monkeypatch.setenv(GLOBAL_SEED, "12")
    assert seed_everything() == 12
    monkeypatch.setenv(GLOBAL_SEED, "x")
    with pytest.raises(SettingError, match="PL_GLOBAL_SEED='x' in the environment is not a seed"):
        seed_everything()


# ------------------------------------------------------------------ generators of a data set's own


class Slotted:
    """A transform with its generator in a slot."""

    __slots__ = ("rng",)

    def __init__(self) -> None:
        self.rng = random.Random(0)


def test_generators_are_found_wherever_a_data_set_keeps_them() -> None:
    """In attributes, transforms, partials, closures, slots and globals; not those of the process."""
    kept = {
        "in a list": [numpy.random.default_rng(1), numpy.random.RandomState(1)],
        "in a slot": Slotted(),
        "process": [torch.default_generator, numpy.random.mtrand._rand, random.SystemRandom()],
        "samples": [random.Random(index) for index in range(1000)],
    }
    generator = torch.Generator()
    found = find_generators(dataset=kept, collate_fn=lambda batch: (batch, generator, MODULE_LEVEL))
    assert sorted(found) == [
        "collate_fn.MODULE_LEVEL",
        "collate_fn.generator",
        "dataset.in a list.0",
        "dataset.in a list.1",
        "dataset.in a slot.rng",
    ]
    assert "collate_fn.MODULE_LEVEL" not in find_generators(module_level=False, collate_fn=lambda: MODULE_LEVEL)


class Augmented(Dataset[Tensor]):
    """Samples that are random numbers, drawn in one of the common ways."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        own: dict[str, Any] = {
            "numpy": numpy.random.default_rng(0),
            "python": random.Random(0),
            "torch": torch.Generator().manual_seed(0),
            "legacy": numpy.random.RandomState(0),
        }
        self.rng = own.get(kind)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        if self.kind == "global":
            return torch.tensor(MODULE_LEVEL.random(), dtype=torch.float64)
        if self.rng is None:
            info: Any = get_worker_info()
            self.rng = numpy.random.default_rng(torch.initial_seed() if self.kind == "initial" else info.seed)
        if isinstance(self.rng, torch.Generator):
            return torch.rand((), generator=self.rng, dtype=torch.float64)
        value = self.rng.random() if hasattr(self.rng, "random") else self.rng.random_sample()
        return torch.tensor(value, dtype=torch.float64)


def give_generator(worker: int) -> None:
    info: Any = get_worker_info()
    info.dataset.rng = numpy.random.default_rng(info.seed)


OWN = ("numpy", "python", "torch", "legacy")
IN_WORKERS = (*OWN, "global", "info", "initial", "init")


def drawn_by(lite: Lite, kind: str, *, path: str = "", stop: int | None = None, **settings: Any) -> list[float]:
    """Return the numbers of two epochs on this rank; save after `stop` batches, or resume from `path`."""
    lite._loaders.clear()
    init = give_generator if kind == "init" else None
    loader = lite.setup_dataloaders(DataLoader(Augmented(kind), batch_size=2, worker_init_fn=init, **settings))
    if path and stop is None:
        lite.load(path, {})
    found: list[float] = []
    for _ in range(1 if path else 2):
        for number, batch in enumerate(loader, 1):
            found += batch.tolist()
            if number == stop:
                lite.save(path, {})
    return found


# ------------------------------------------------------------------ on ranks


@contextmanager
def a_lite(world: World) -> Iterator[Lite]:
    with Lite(accelerator="cpu", devices=world.world_size) as lite:
        lite.seed_everything(7, per_rank=False)
        yield lite


def everyones(lite: Lite, mine: Any) -> list[Any]:
    return lite._hooks.collective_all_gather_object(obj=mine, group=None)  # type: ignore[no-any-return]


def no_two_of_rank_worker_and_epoch_draw_alike(lite: Lite) -> None:
    """With any generator, numbers differ between ranks, workers and epochs."""
    for kind in IN_WORKERS:
        everyone = everyones(lite, drawn_by(lite, kind, num_workers=2))
        flat = [value for each in everyone for value in each]
        assert len(set(flat)) == len(flat) == 24, kind
    stay: dict[str, Any] = {"persistent_workers": True, "multiprocessing_context": "spawn"}
    everyone = everyones(lite, drawn_by(lite, "numpy", num_workers=1, **stay))
    flat = [value for each in everyone for value in each]
    assert len(set(flat)) == len(flat) == 24


def without_workers_ranks_draw_apart_too(lite: Lite) -> None:
    """Without workers, a dataset's generator differs by rank, and rank 0 draws the numbers of one process."""
    for kind in OWN:
        everyone = everyones(lite, drawn_by(lite, kind))
        flat = [value for each in everyone for value in each]
        assert len(set(flat)) == len(flat) == 24, kind
        alone = Augmented(kind)
        assert everyone[0] == [float(alone[0]) for _ in range(12)], kind


def workers_do_not_count(lite: Lite) -> None:
    """Draws from a dataset's generator do not depend on the number of workers."""
    for kind in ("torch", "global", "init"):
        assert drawn_by(lite, kind, num_workers=1) == drawn_by(lite, kind, num_workers=2), kind


def own_generators_go_on_inside_an_epoch(lite: Lite) -> None:
    """A resume in the middle of an epoch draws the same numbers from a dataset's generator (law 4)."""
    path = os.path.join(os.environ["SEEDS_FOLDER"], "x")
    for kind, settings in (("numpy", {}), ("torch", {}), ("python", {"num_workers": 2}), ("init", {"num_workers": 2})):
        whole = drawn_by(lite, kind, path=path, stop=1, **settings)
        assert drawn_by(lite, kind, path=path, **settings) == whole[2:6], kind


class Shuffled(IterableDataset[int]):
    """A stream that shuffles by the worker's seed."""

    def __iter__(self) -> Iterator[int]:
        info: Any = get_worker_info()
        order = list(range(info.id, 24, info.num_workers))
        random.Random(info.seed).shuffle(order)
        yield from order


def streams_may_shuffle_by_the_seed_of_a_worker(lite: Lite) -> None:
    """The worker seed of a divided stream is equal on all ranks: each sample is read once."""
    torch.rand(lite.global_rank)  # so that the ranks' own generators differ
    loader = lite.setup_dataloaders(DataLoader(Shuffled(), batch_size=2, num_workers=2))
    everyone = everyones(lite, [sample for batch in loader for sample in batch.tolist()])
    assert sorted(sample for each in everyone for sample in each) == list(range(24))
    assert everyone[0] != sorted(everyone[0])


def a_drawn_seed_is_rank_0s(lite: Lite) -> None:
    """``seed_everything()`` gives all ranks one seed, before and after the job starts."""
    assert len(set(everyones(lite, lite.seed_everything()))) == 1
    assert len(set(everyones(lite, torch.rand(()).item()))) == 1
    # As two processes with nothing in common would.
    seed_process(100 + lite.global_rank, drawn=True, per_rank=None)
    SharedSeed().on_connect(lite._session.started())
    assert PROCESS.seed == 100
    assert len(set(everyones(lite, torch.rand(()).item()))) == 1


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(numpy.random.rand())


def each_rank_draws_its_own_from_set_up_on(lite: Lite) -> None:
    """Numbers of torch, Python and NumPy differ after set-up; values before it, and a split after it, are equal."""
    lite.seed_everything(1, per_rank=True)
    before = draws()
    model = lite.setup(nn.Linear(3, 3))
    own = everyones(lite, (before, draws(), model.weight.flatten().tolist()))
    assert own[0][0] == own[1][0]
    assert not set(own[0][1]) & set(own[1][1])
    assert own[0][2] == own[1][2]
    parts = everyones(lite, [list(part.indices) for part in random_split(range(20), [12, 8])])  # type: ignore[arg-type]
    assert parts[0] == parts[1]
    again = lite.setup(nn.Linear(3, 3))
    weights = everyones(lite, again.weight.flatten().tolist())
    assert weights[0] == weights[1] != own[0][2]
    lite.seed_everything(1)
    equal = everyones(lite, draws())
    assert equal[0] == equal[1] == before
    assert random_split.__defaults__ == (torch.default_generator,)
    lite.seed_everything(2, per_rank=True)
    apart = everyones(lite, draws())
    assert not set(apart[0]) & set(apart[1])
    lite.seed_everything(3, per_rank=False)


def train(lite: Lite, *, dropout: bool = False, noise: str = "", per_rank: bool | None = None) -> None:
    lite.seed_everything(1, per_rank=per_rank)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5) if dropout else nn.Identity())
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fixed = torch.randn(4)  # drawn once, equal on purpose
    makers = {"torch": lambda: torch.rand(()).item(), "numpy": numpy.random.rand, "random": random.random}
    lite._streams = lite._job_state.random_check = None  # as a job that begins
    draw_apart(lite)
    loader = lite.setup_dataloaders(DataLoader(torch.ones(24, 4), batch_size=2, shuffle=True))
    for batch in loader:
        z = makers[noise]() if noise else 0.0
        lite.backward(model(batch + z * fixed).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert lite._job_state.random_check is None


def equal_draws_are_told_once(lite: Lite) -> None:
    """Dropout or noise that is equal on all ranks is logged once; nothing else is."""
    from plugframe.data import random_check as module

    told: list[str] = []
    tell, module.tell = module.tell, lambda message, warn: told.append(message)
    try:
        for settings, expected in (
            ({}, ""),
            ({"dropout": True}, "the model (dropout and the like)"),
            ({"noise": "torch"}, "the loop by torch"),
            ({"noise": "numpy"}, "the loop by numpy"),
            ({"noise": "random"}, "the loop by random"),
            ({"dropout": True, "per_rank": True}, ""),
            ({"noise": "random", "per_rank": True}, ""),
            ({"dropout": True, "per_rank": False}, ""),
        ):
            told.clear()
            train(lite, **settings)  # type: ignore[arg-type]
            assert len(told) == bool(expected and lite.is_global_zero), (settings, told)
            assert expected in "".join(told) or not lite.is_global_zero
    finally:
        module.tell = tell


def games_between_many_steps_are_told(lite: Lite) -> None:
    """A script without loaders that draws before every twelfth step is reported, and the check ends."""
    from plugframe.data import random_check as module

    told: list[str] = []
    tell, module.tell = module.tell, lambda message, warn: told.append(message)
    try:
        lite.seed_everything(1)
        model = nn.Linear(2, 2)
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        lite._loaders.num_passes = 0
        lite._streams = lite._job_state.random_check = None
        draw_apart(lite)
        for number in range(20):
            x = torch.rand(2, 2) if number % 12 == 0 else torch.ones(2, 2)
            lite.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        assert len(told) == lite.is_global_zero
        assert lite._job_state.random_check is None
    finally:
        module.tell = tell


def ranks_of_one_group_must_draw_alike(lite: Lite) -> None:
    """Ranks that read the same batches and draw different numbers are refused, on all ranks."""
    torch.manual_seed(lite.global_rank)
    check = RandomStreamCheck(index=0, hooks=lite._hooks, context=lite._session.started(), loaders=lite._loaders)
    before = check.before_forward()
    assert before is not None
    torch.rand(1)
    check.after_forward(before)
    with pytest.raises(OutOfSyncError, match="Ranks 0 and 1 read the same batches, and the model drew different"):
        check.after_step()


CHECKS = (
    no_two_of_rank_worker_and_epoch_draw_alike,
    without_workers_ranks_draw_apart_too,
    workers_do_not_count,
    own_generators_go_on_inside_an_epoch,
    streams_may_shuffle_by_the_seed_of_a_worker,
    a_drawn_seed_is_rank_0s,
    each_rank_draws_its_own_from_set_up_on,
    equal_draws_are_told_once,
    games_between_many_steps_are_told,
    ranks_of_one_group_must_draw_alike,
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = str(tmp_path_factory.mktemp("seeds"))
    return run_checks(2, a_lite, CHECKS, env={"SEEDS_FOLDER": folder})


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_two_ranks(outcome: dict[str, str], check: Any) -> None:
    """Each rule above holds on two ranks."""
    assert not outcome[check.__name__]
