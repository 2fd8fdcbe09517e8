"""Where loaders stand: epochs, passes over the data, what the batch at hand weighs; and how to resume."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from plugframe.data.batch_weights import Entry, Weights
from plugframe.data.epochs import EpochOf
from plugframe.data.generators import Held, pack_held, unpack_held
from plugframe.data.position import Layout, converted
from plugframe.data.random_sources import fits, get_state, pack, set_state, unpack
from plugframe.data.seed import rng_problem, rng_state, set_rng_state, take_rng
from plugframe.data.sharding import ShardedIterable, Start
from plugframe.data.shuffle import Draws, Order
from plugframe.errors import CheckpointMismatchError, OrderError
from plugframe.utils.swap import KEY, State

if TYPE_CHECKING:
    from plugframe.data.loaders import Loaders


class Reading:
    """One pass over a loader, from ``iter(loader)`` to its end.

    Attributes:
        epoch: which it is.
        position: batches handed over.
        weight: of the batch handed over last.
        weights: of the batches that were put together since, in order.
        skip: batches to leave out at the beginning.
        origin: what all ranks together had read of the epoch when their number last changed: samples, or batches of
            a batch sampler; positions count from there.
        first: the number of the first batch from there, which its random numbers go by.
        begun: whether a sampler was asked for its indices.
        before: the states of the process's generators, of those the order is drawn from, and of those its samples
            are changed with, when it began.
        owner: tells its loader from others; not the loader's state, which would keep itself alive.
        count: of the shares of its loader.
        even: whether it began as a pass of the training, in which every rank takes part in every step.
        handed: whether a batch was handed over.
        opening: whether its second batch was not asked for yet.
        unsure: whether it may turn out to be read ahead, or not to train.
        mixed: whether its batches so far weigh differently.
        ahead: whether its second batch was asked for before a model had run on the first.
        used: whether a model has run since its first batch was handed over.
        trains: whether one has in training mode with gradients, or a backward.
        met: whether the script exchanged something between ranks since.
        exchanges: how many collectives there were when it began; None where nobody can tell.
        closed: whether it is over.
        stamp: how many backwards there were when its last batch was handed over.
        entries: the batches that may still be trained on, as far as they are taken note of.
    """

    count = 1
    closed = handed = unsure = mixed = ahead = used = trains = met = False

    def __init__(self, epoch: int, sources: list[Any], held: Held, *, even: bool, owner: Any = None) -> None:
        self.epoch = epoch
        self.even = even
        self.owner = owner
        self.opening = True
        self.stamp = 0
        self.exchanges: int | None = None
        self.entries: deque[Entry] = deque()
        self.position = 0
        self.weight = 1.0
        self.weights: deque[float] = deque()
        self.skip = 0
        self.origin = 0
        self.first = 0
        self.begun = False
        self.before = (take_rng(), [get_state(source) for source in sources], pack_held(held))


class LoaderState(State):
    """What an adopted loader knows.

    Attributes:
        epoch: how many epochs were started.
        training: whether the epoch that starts now trains: every rank must then take part in every step.
        replaced: attributes of the loader that something stands in for, to be put back.
        weight: what the last batch weighs against those of the other ranks; None outside of an epoch.
        divided: whether its indices are divided between the ranks here.
        index: of this rank's share of the data.
        count: of the shares.
        weights: of the batches at hand, in the job.
        token: tells it from others.
        layout: what the place of a pass goes by besides its position.
        indexed: whether it can leave out what was read, and need not read it again.
        seeding: whether batches are being handed to worker processes that seed themselves for each.
        draws: gives the random numbers for the sampler in an epoch.
        sources: the user's own generators that the order of its samples is drawn from.
        held: those in this process that the samples themselves are changed with; see `plugframe.data.generators`.
        salts: of those that its dataset or ``collate_fn`` held at set-up.
        resumes: whether it goes on in the middle of an epoch by what is known here.
        loader: returns the loader, while there is one.
        moved: whether the loader has been told where to go on, and the pass that does is still to begin.
        beginning: the pass that begins now.
        job: the loaders of the job it belongs to.
        early: whether it was set up before any loader of the job was read.
        compare: compares the first window of a stream with those of the other ranks; None once it has.
        trained: whether a pass over it trained that did not look like it when it began.
    """

    iterable: ShardedIterable | None = None
    divided = False
    index = 0
    count = 1
    layout = Layout()
    indexed = False
    seeding = False
    draws: Callable[[int], Draws | None]
    weight: float | None = None
    resumes = True
    moved = False
    job: Loaders | None = None
    early = True
    trained = False
    compare: Callable[..., None] | None = None

    def __init__(self, *, hooks: Any, device: Any, order: Order, training: Callable[[], bool], weigh: bool) -> None:
        self.hooks = hooks
        self.device = device
        self.order = order
        self.training = training
        self.weigh = weigh
        self.epoch = 0
        self.replaced: dict[str, Any] = {}
        self.targets: list[EpochOf] = []
        self.sources: list[Any] = []
        self.held: Held = {}
        self.salts: dict[str, int] = {}
        self.readings: list[Reading] = []
        self.kept: Mapping[str, Any] | None = None
        self.beginning: Reading | None = None
        self.loader: Callable[[], Any] = lambda: None
        self.weights = Weights()
        self.token = object()

    def plain_dict(self, obj: Any) -> dict[str, Any]:
        """Return the attributes of the plain object."""
        return {**{k: v for k, v in obj.__dict__.items() if k != KEY}, **self.replaced}

    def begin(self) -> Reading:
        """Begin a pass: count the epoch and tell it to what wants to know."""
        for target in self.targets:
            target.tell(self.epoch)
        if self.job is not None:
            self.job.begun = True
            self.job.passes += 1
        reading = Reading(self.epoch, self.sources, self.held, even=self._even(), owner=self.token)
        self.beginning = reading
        reading.count = self.count
        # A pass without gradients is no epoch of the training: one rank may evaluate alone, and the order stays common.
        self.epoch += torch.is_grad_enabled()
        if self.iterable is not None:
            self.iterable.tell(reading.epoch, even=reading.even)
        return reading

    def _even(self) -> bool:
        return self.training() or (self.trained and torch.is_grad_enabled())

    def begin_indices(self) -> Callable[[], Start]:
        """Return what gives the sampler, at its first index, what the pass that begins now starts with."""
        assert self.beginning is not None
        return functools.partial(self._start_indices, self.beginning, self.seeding)

    def _start_indices(self, reading: Reading, seeding: bool) -> Start:
        if reading.begun:
            # A loader class that starts anew within one pass, as one without an end does: that is another epoch.
            again = self.begin()
            reading.epoch, reading.position, reading.before = again.epoch, 0, again.before
            reading.origin = reading.first = 0
            self.beginning = reading
        reading.begun = True
        skip, reading.skip = reading.skip, 0
        seeds = functools.partial(self.order.seed_of, reading.epoch, self.index) if seeding else None
        return Start(
            self.draws(reading.epoch),
            reading.even,
            reading.weights.append,
            skip,
            seeds,
            trains=functools.partial(getattr, reading, "trains"),
            origin=reading.origin,
            first=reading.first,
        )

    def evaluates(self, reading: Reading) -> bool:
        """Look at what the script has done with the batches so far, and say whether it evaluates.

        What a pass is for is read from the gradient and training modes when it begins; a script may say it only
        inside of its loop. A model that runs with gradients in training mode, or a backward, means training.
        """
        self.weights.absorb()
        if reading.opening:
            reading.opening = False
            reading.ahead = not reading.used
        if reading.trains and not reading.even:
            # Every model is in evaluation mode, as where the running statistics of one are kept, and yet it trains.
            self.trained = True
            if self.iterable is not None:
                self.iterable.tell_more(even=True)
        reading.unsure = not reading.trains
        return reading.used and not reading.trains

    def withhold(self, reading: Reading) -> None:
        """Leave out a batch that would only keep step with the other ranks: an evaluation has seen its samples.

        Raises:
            OrderError: if the loop exchanges something for every batch: the other ranks would wait for it.
        """
        reading.weights.popleft()
        counts = self.weights.exchanges
        if reading.met or (counts is not None and counts() != reading.exchanges):
            raise OrderError(
                "This rank has no samples left for the last batch of an evaluation whose loop exchanges something "
                "between ranks for every batch: turn gradients off before the loop, not in it (with torch.no_grad(): "
                "for batch in loader: ...), so that samples are divided for it; or exchange once, after the loop."
            )

    def compare_window(self, window: str) -> None:
        """Compare the first window of a stream with those of the other ranks, once.

        Raises:
            SettingError: if they differ.
        """
        assert self.iterable is not None
        self.iterable.compare = False
        self.iterable.window = None
        compare, self.compare = self.compare, None
        if compare is not None and window:
            compare(digest=window, key=str(self.order.number))

    def hand_over(self, reading: Reading, batch: Any = None) -> None:
        """Note that `reading` has just read a batch."""
        weights = self.weights
        if not reading.handed:
            reading.handed = True
            weights.begin(reading)
            reading.unsure = self.count > 1
        reading.position += 1
        if reading.weights:
            weight = reading.weights.popleft()
            # One that only keeps step counts for nothing, whatever a loss is.
            weight = weight if self.weigh or not weight else 1.0
            reading.mixed |= not reading.opening and weight != reading.weight
            reading.weight = weight
        if self.readings[-1] is not reading:
            self.readings.remove(reading)
            self.readings.append(reading)
        self.weight = reading.weight
        if self.count > 1:
            self._note(reading, batch)

    def _note(self, reading: Reading, batch: Any) -> None:
        weights = self.weights
        weights.to_front(reading)
        reading.stamp = weights.backwards
        # The even batches of a plain loop need no note: it uses the one that was read last.
        if reading.opening or reading.ahead or reading.weight != 1.0 or len(weights.open) > 1:
            weights.hand_over(reading, batch)
        if weights.uneven:
            weights.moved_on()

    def open(self, reading: Reading) -> None:
        """Note that `reading` is being read."""
        if not self.readings and self.job is not None:
            self.job.active.append(self)
        self.readings.append(reading)
        self.weights.open.append(reading)

    def close(self, reading: Reading) -> None:
        """Note that `reading` is over: the weight that counts is that of a pass around it, if there is one."""
        self.weights.close(reading)
        self.readings.remove(reading)
        self.weight = self.readings[-1].weight if self.readings else None
        if not self.readings and self.job is not None and self in self.job.active:
            self.job.active.remove(self)

    def where(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return where the loader stands, for a checkpoint: what all ranks share, and what is this rank's own."""
        common: dict[str, Any] = {
            "number": self.order.number,
            "seed": self.order.seed,
            "epoch": self.epoch,
            "position": 0,
            "early": self.early,
        }
        if not self.readings:
            return common, {
                "generators": [pack(get_state(source)) for source in self.sources],
                "held": pack_held(self.held),
            }
        reading = self.readings[-1]
        common["epoch"] = reading.epoch
        rng, sources, held = reading.before
        own: dict[str, Any] = {"generators": [pack(state) for state in sources]}
        own["held"] = pack_held(self.held) if self.indexed else held
        if self.resumes:
            common["position"] = reading.position
            common.update(origin=reading.origin, first=reading.first, layout=list(self.layout))
            own["rng"] = rng_state(rng)
            place = self.iterable.place() if self.iterable is not None and reading.position else None
            if place is not None:
                own["place"] = place
        elif (loader := self.loader()) is not None:
            common["layout"] = list(self.layout)
            own["loader"] = loader.state_dict()
        return common, own

    def go_on(self, common: Mapping[str, Any], own: Mapping[str, Any] | None, *, same: bool) -> None:
        """Have the next pass begin where `where` was asked.

        Args:
            own: what is a rank's own, None if no rank had it.
            same: whether it is this rank's; if not, that of another one, which shares what the order is drawn from.

        Raises:
            CheckpointMismatchError: if this loader cannot resume at that position.
        """
        place = converted(common, self.layout)
        self.order.seed = common["seed"]
        self.epoch = common["epoch"]
        self.kept = None
        if own is None:
            return
        for source, state in zip(self.sources, own.get("generators", ()), strict=False):
            set_state(source, unpack(state))
        if same:
            unpack_held(self.held, own.get("held", {}))
        loader = self.loader()
        if "loader" in own and loader is not None:
            loader.load_state_dict(own["loader"])
            self.moved = True
        if place.position or place.origin:
            self.kept = {**place._asdict(), "rng": own.get("rng"), "place": own.get("place")}

    def problem(self, common: Mapping[str, Any], own: Mapping[str, Any] | None) -> str | None:
        """Return why `go_on` would fail, None if it would not."""
        try:
            converted(common, self.layout)
        except CheckpointMismatchError as error:
            return str(error)
        if own is None:
            return None
        for source, state in zip(self.sources, own.get("generators", ()), strict=False):
            if not fits(source, unpack(state)):
                return f"the state of a {type(source).__name__} of a loader was saved by another version"
        return rng_problem(own["rng"]) if own.get("rng") is not None else None

    def remember(self) -> Callable[[], None]:
        """Return what undoes `go_on`; a loader's own ``load_state_dict`` aside."""
        before = self.order.seed, self.epoch, self.kept, self.moved
        states = [get_state(source) for source in self.sources]
        held = pack_held(self.held)

        def back() -> None:
            self.order.seed, self.epoch, self.kept, self.moved = before
            for source, state in zip(self.sources, states, strict=True):
                set_state(source, state)
            unpack_held(self.held, held)

        return back

    @contextmanager
    def replaying(self, kept: Mapping[str, Any]) -> Iterator[None]:
        """Have the random numbers of the pass that is gone on with, and those of now again afterwards."""
        now = rng_state()
        if kept["rng"] is not None:
            set_rng_state(kept["rng"])
        try:
            yield
        finally:
            set_rng_state(now)
