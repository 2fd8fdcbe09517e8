"""A run that is saved, killed and resumed continues exactly, wherever in an epoch it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from plugframe import Lite, PlugframeWarning
from plugframe.data.generators import generator_attributes
from plugframe.utils.rng import get_state, pack, set_state, unpack

NUMBER = 23


def noise() -> list[float]:
    return [torch.rand(()).item(), random.random(), numpy.random.rand()]


class Noisy(Dataset[torch.Tensor]):
    """Data that is randomly augmented when it is read."""

    def __len__(self) -> int:
        return NUMBER

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, *noise()], dtype=torch.float64)


class Stream(IterableDataset[torch.Tensor]):
    """A stream, divided between workers, with a shuffle buffer and random augmentation."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        buffer: list[int] = []
        for index in range(info.id if info else 0, NUMBER + 4, info.num_workers if info else 1):
            if index < NUMBER:
                buffer.append(index)
            if index >= NUMBER or len(buffer) > 3:
                drawn = buffer.pop(random.randrange(len(buffer))) if buffer else -1
                yield torch.tensor([drawn, *noise()], dtype=torch.float64)


class Sampler:
    """A custom sampler with its own generators or those of the process."""

    def __init__(self, draw: Callable[[int], int], **generators: Any) -> None:
        self.draw = draw
        self.__dict__.update(generators)

    def __iter__(self) -> Iterator[int]:
        left = list(range(NUMBER))
        while left:
            yield left.pop(self.draw(len(left)))

    def __len__(self) -> int:
        return NUMBER


class Endless(DataLoader[Any]):
    """A loader that restarts by itself."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from super().__iter__()


def drawing_alone(source: Any, draw: Callable[[Any, int], int]) -> Sampler:
    return Sampler(lambda number: draw(source, number), source=source)


def loader_of(kind: str) -> DataLoader[Any]:
    data, size = Noisy(), 3
    if kind.startswith("stream"):
        return DataLoader(Stream(), batch_size=None if "no batches" in kind else size, num_workers=2 * ("work" in kind))
    makers: dict[str, Callable[[], DataLoader[Any]]] = {
        "in order": lambda: DataLoader(data, batch_size=size),
        "shuffled": lambda: DataLoader(data, batch_size=size, shuffle=True, drop_last=True),
        "no batches": lambda: DataLoader(data, batch_size=None, shuffle=True),
        "workers": lambda: DataLoader(data, batch_size=size, shuffle=True, num_workers=2),
        "generator": lambda: DataLoader(
            data, batch_size=size, shuffle=True, generator=torch.Generator().manual_seed(5)
        ),
        "generator, workers": lambda: DataLoader(
            data, batch_size=size, shuffle=True, num_workers=1, generator=torch.Generator().manual_seed(5)
        ),
        "weighted": lambda: DataLoader(data, batch_size=size, sampler=WeightedRandomSampler(torch.ones(NUMBER), 30)),
        "batch sampler": lambda: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), size, False)),
        "distributed": lambda: DataLoader(data, batch_size=size, sampler=DistributedSampler(data, 1, 0)),
        "endless": lambda: Endless(data, batch_size=size, shuffle=True),
        "own, Python": lambda: DataLoader(data, batch_size=size, sampler=Sampler(random.randrange)),
        "own, NumPy": lambda: DataLoader(data, batch_size=size, sampler=Sampler(numpy.random.randint)),
        "own generator, Python": lambda: DataLoader(
            data, batch_size=size, sampler=drawing_alone(random.Random(1), lambda source, n: source.randrange(n))
        ),
        "own generator, NumPy": lambda: DataLoader(
            data,
            batch_size=size,
            sampler=drawing_alone(numpy.random.default_rng(1), lambda source, n: int(source.integers(n))),
        ),
    }
    return makers[kind]()


KINDS = (
    *("in order", "shuffled", "no batches", "workers", "generator", "generator, workers", "weighted"),
    *("batch sampler", "distributed", "endless", "own, Python", "own, NumPy"),
    *("own generator, Python", "own generator, NumPy", "stream", "stream, workers", "stream, no batches"),
)


def steps(path: Path, kind: str, *, save_after: int | None) -> tuple[list[Any], int]:
    """Train some steps; return a record of each, and the number of steps before the checkpoint was saved or loaded."""
    random.seed(0)
    numpy.random.seed(0)
    done: list[Any] = []
    with Lite(accelerator="cpu", devices=1) as lite:
        lite.seed_everything(0)
        lite.setup(nn.Linear(1, 1))
        loader = lite.setup_dataloaders(loader_of(kind))
        state = {"epoch": 0, "step": 0}
        if save_after is None:
            lite.load(path, state)
        step = before = state["step"]
        for epoch in range(state["epoch"], 3):
            for batch in loader:
                done.append((batch.tolist(), noise(), lite.batch_weight))
                step += 1
                if step == save_after:
                    lite.save(path, {"epoch": epoch, "step": step})
                if step == 18:
                    return done, save_after or before
    return done, save_after or before


@pytest.mark.parametrize("kind", KINDS)
def test_every_loader_goes_on_inside_an_epoch(kind: str, tmp_path: Path) -> None:
    """Batches, weights and random numbers after a resume equal those of an uninterrupted run (law 4)."""
    path = tmp_path / "x"
    for stop in (2, 8, 11):
        whole, before = steps(path, kind, save_after=stop)
        # The end of an epoch is no place inside it.
        again = kind in ("endless", "stream", "stream, workers", "stream, no batches")
        with pytest.warns(PlugframeWarning, match="batches of a .* are read again") if again else nullcontext():
            rest, loaded = steps(path, kind, save_after=None)
        assert loaded == before == stop
        assert rest == whole[stop:]


class Noted(Noisy):
    """The same data, recording each read in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getitem__(self, index: int) -> torch.Tensor:
        with open(self.path, "a") as file:
            file.write(f"{index} ")
        return super().__getitem__(index)


@pytest.mark.parametrize(("workers", "later"), [(0, 0), (2, 2), (2, 1)])
def test_what_was_read_is_not_read_again(workers: int, later: int, tmp_path: Path) -> None:
    """A resumed epoch begins with its next batch, also with another number of worker processes."""
    path = tmp_path / "x"

    def run(workers: int, *, save_after: int | None) -> tuple[list[Any], list[int]]:
        noted = tmp_path / "noted"
        noted.write_text("")
        batches: list[Any] = []
        with Lite(accelerator="cpu", devices=1) as lite:
            lite.seed_everything(0)
            data = Noted(noted)
            loader = lite.setup_dataloaders(DataLoader(data, batch_size=3, shuffle=True, num_workers=workers))
            assert loader.dataset is data
            if save_after is None:
                lite.load(path, {})
            for batch in loader:
                batches.append(batch.tolist())
                if len(batches) == save_after:
                    lite.save(path, {})
        return batches, [int(index) for index in noted.read_text().split()]

    whole, _ = run(workers, save_after=5)
    rest, read = run(later, save_after=None)
    assert rest == whole[5:]
    assert sorted(read) == sorted(int(row[0]) for batch in rest for row in batch)


class Counter(IterableDataset[torch.Tensor]):
    """A stream with ``state_dict`` and random augmentation."""

    def __init__(self) -> None:
        self.position = 0
        self.read: list[int] = []

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.position < NUMBER:
            self.position += 1
            self.read.append(self.position)
            yield torch.tensor([self.position, *noise()], dtype=torch.float64)
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def test_a_stream_that_knows_where_it_is_goes_on_from_there(tmp_path: Path) -> None:
    """An iterable dataset with ``state_dict`` is not read from its beginning."""

    def run(*, resume: bool) -> tuple[list[Any], list[int]]:
        batches: list[Any] = []
        with Lite(accelerator="cpu", devices=1) as lite:
            lite.seed_everything(0)
            loader = lite.setup_dataloaders(DataLoader(Counter(), batch_size=3))
            state = {"epoch": 0}
            if resume:
                lite.load(tmp_path / "x", state)
            for epoch in range(state["epoch"], 3):
                for batch in loader:
                    batches.append(batch.tolist())
                    if len(batches) == 11 and not resume:
                        lite.save(tmp_path / "x", {"epoch": epoch})
            return batches, loader.dataset.read

    whole, read = run(resume=False)
    rest, read_later = run(resume=True)
    assert rest == whole[11:]
    assert read_later == read[-len(read_later) :]
    assert len(read_later) == sum(map(len, rest))


@pytest.mark.parametrize("prepared", ["before", "after", "one of each"])
def test_loaders_made_before_after_and_later_are_told_apart(prepared: str, tmp_path: Path) -> None:
    """Loaders set up before or after a load, or for every epoch, resume their own orders."""

    def run(*, resume: bool) -> list[list[int]]:
        def loader() -> DataLoader[Any]:
            return lite.setup_dataloaders(DataLoader(range(9), shuffle=True))  # type: ignore[no-any-return]

        def read(loader: DataLoader[Any]) -> list[int]:
            return [int(value) for value in loader]

        state = {"epoch": 0}
        with Lite(accelerator="cpu", devices=1) as lite:
            lite.seed_everything(3)
            train = loader() if prepared != "after" else None
            other = loader() if prepared == "before" else None
            if resume:
                lite.load(tmp_path / "x", state)
            train, other = train or loader(), other or loader()
            for epoch in range(state["epoch"], 3):
                orders = [read(train), read(other), read(once := loader())]
                if epoch == 1 and not resume:
                    lite.save(tmp_path / "x", {"epoch": epoch + 1})
                del once
        return orders

    assert run(resume=False) == run(resume=True)


def test_a_loader_that_keeps_its_own_position_is_not_moved_twice(tmp_path: Path) -> None:
    """A loader class with ``load_state_dict`` resumes itself; only its epoch is restored."""

    class Stateful(DataLoader[Any]):
        """A loader with ``state_dict``."""

        position = skipped = 0

        def __iter__(self) -> Iterator[Any]:
            self.skipped, self.position = self.position, 0
            for batch in after(super().__iter__(), self.skipped):
                self.position += 1
                yield batch

        def state_dict(self) -> dict[str, Any]:
            return {"position": self.skipped + self.position}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.position = state["position"]

    def run(*, resume: bool) -> list[Any]:
        with Lite(accelerator="cpu", devices=1) as lite:
            lite.seed_everything(3)
            loader = lite.setup_dataloaders(Stateful(range(NUMBER), batch_size=3, shuffle=True))
            if resume:
                lite.load(tmp_path / "x", {"loader": loader})
            batches = []
            for step, batch in enumerate(loader):
                batches.append(batch.tolist())
                if step == 2 and not resume:
                    lite.save(tmp_path / "x", {"loader": loader})
        return batches

    assert run(resume=False)[3:] == run(resume=True)


@pytest.mark.filterwarnings("ignore:.*set_vital.* is deprecated:UserWarning")
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_goes_on_by_itself(workers: int, told: bool, tmp_path: Path) -> None:
    """torchdata's loader resumes exactly, whether or not the script passes it to ``save`` and ``load``."""
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def run(*, resume: bool) -> list[Any]:
        batches: list[Any] = []
        with Lite(accelerator="cpu", devices=1) as lite:
            lite.seed_everything(3)
            data = loaders.StatefulDataLoader(Noisy(), batch_size=3, shuffle=True, num_workers=workers)
            loader = lite.setup_dataloaders(data)
            state: dict[str, Any] = {"epoch": 0, **({"loader": loader} if told else {})}
            if resume:
                lite.load(tmp_path / "x", state)
            for epoch in range(state["epoch"], 3):
                for batch in loader:
                    batches.append((batch.tolist(), noise()))
                    if len(batches) == 11 and not resume:
                        lite.save(tmp_path / "x", {**state, "epoch": epoch})
        return batches

    assert run(resume=False)[11:] == run(resume=True)


def after(batches: Iterator[Any], start: int) -> Iterator[Any]:
    for _ in range(start):
        next(batches)
    yield from batches


def test_an_older_checkpoint_of_other_ranks_begins_the_epoch_anew(tmp_path: Path) -> None:
    """A position for another number of ranks restores the epoch only, with a warning."""
    with Lite(accelerator="cpu", devices=1) as lite:
        lite.seed_everything(1)
        loader = lite.setup_dataloaders(DataLoader(range(9), shuffle=True))
        list(loader)
        order = [int(value) for value in loader]
        lite.save(tmp_path / "x", {})
        batches = iter(loader)
        third = int(next(batches))
        lite.save(tmp_path / "y", {})
    content = {}
    with Lite(accelerator="cpu", devices=1) as lite:
        session = lite._session
        loader = lite.setup_dataloaders(DataLoader(range(9), shuffle=True))
        load = session.hooks.checkpoint_load

        def of_two_ranks(**kwargs: Any) -> Any:
            content.update(load(**kwargs))
            run = content["__plugframe__"]
            run["rng"] *= 2
            for kept in run["loaders"]["known"]:
                kept.pop("layout", None)  # as an older plugframe saved it
            return dict(content)

        session.hooks.checkpoint_load = of_two_ranks
        with pytest.warns(PlugframeWarning, match="2 ranks saved, 1 load: .* that had begun starts from its beginning"):
            lite.load(tmp_path / "y", {})
        assert int(next(iter(loader))) == third
    assert order != sorted(order)


def test_generators_of_every_kind_come_back() -> None:
    """The states of the user's generators, including 128-bit ones, survive a checkpoint."""
    sources = [torch.Generator().manual_seed(1), random.Random(1), numpy.random.RandomState(1)]
    bits = (numpy.random.PCG64, numpy.random.Philox, numpy.random.SFC64, numpy.random.MT19937)
    sources += [numpy.random.Generator(kind(1)) for kind in bits]
    owner = Sampler(random.randrange, **{f"of_{index}": source for index, source in enumerate(sources)})
    assert generator_attributes(owner, owner) == sources
    for source in sources:

        def draw(source: Any = source) -> float:
            return torch.rand((), generator=source).item() if isinstance(source, torch.Generator) else source.random()

        draw()
        packed = pack(get_state(source))
        assert isinstance(packed, (str, torch.Tensor))
        drawn = draw()
        set_state(source, unpack(packed))
        assert draw() == drawn
