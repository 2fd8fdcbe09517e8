"""State of an adopted loader: its epochs, passes over the data, weights of batches; and how it resumes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from plugframe.data.batch_weights import BatchWeights
from plugframe.data.epochs import EpochSetter
from plugframe.data.generators import Generators, pack_states, restore_states
from plugframe.data.loader_pass import LoaderPass
from plugframe.data.position import Layout, resume_point
from plugframe.data.sharded_iterable import ShardedIterable
from plugframe.data.sharding import PassStart
from plugframe.data.shuffle import RandomStream, Shuffle
from plugframe.errors import CheckpointMismatchError, OrderError
from plugframe.utils.rng import (
    accepts_state,
    get_state,
    load_rng_state,
    pack,
    rng_state,
    rng_state_problem,
    set_state,
    unpack,
)
from plugframe.utils.swap import KEY, State

if TYPE_CHECKING:
    from plugframe.data.loaders import Loaders


class LoaderState(State):
    """State of an adopted loader.

    Attributes:
        epoch: number of epochs started.
        training: returns whether the epoch that starts now trains: every rank must then take part in every step.
        replaced: original values of replaced attributes of the loader.
        weight: of the last batch, relative to those of the other ranks; None outside of an epoch.
        sharded: whether its indices are divided between the ranks here.
        index: data shard of this rank.
        count: number of data shards.
        weights: weights of the batches in use, of the job.
        owner: identifies the loader.
        layout: the unit of a position.
        indexed: whether it can skip batches that were read, without reading them again.
        seeds_workers: whether batches are being sent to worker processes with a seed each.
        random_stream: returns the random stream of the sampler in an epoch.
        sampling_generators: the user's own generators that determine the order of samples.
        transform_generators: those in this process that samples are transformed with; see `plugframe.data.generators`.
        salts: hashes of those of the dataset or ``collate_fn`` at set-up.
        resumable: whether plugframe resumes it in the middle of an epoch; a loader with ``state_dict`` resumes itself.
        loader: returns the loader, while it exists.
        position_loaded: whether the loader's own position was loaded, and the next pass is yet to begin.
        starting_pass: the pass that begins now.
        resume_from: the position at which the next pass begins; None for the beginning.
        job: the loaders of the job.
        early: whether it was set up before any loader of the job was read.
        compare: compares the first window of a stream between ranks; None afterwards.
        trained: whether a pass trained that did not look like it when it began.
        unbatched: whether it returns samples of the dataset as they are (each may be a batch).
        dropped: returns how many samples are left out that one process would read; None if none are.
        one_for_one: whether it returns exactly the batches that its sampler yields.
    """

    iterable: ShardedIterable | None = None
    sharded = False
    index = 0
    count = 1
    layout = Layout()
    indexed = False
    seeds_workers = False
    random_stream: Callable[[int], RandomStream | None]
    weight: float | None = None
    resumable = True
    position_loaded = False
    job: Loaders | None = None
    early = True
    trained = False
    unbatched = False
    one_for_one = False
    compare: Callable[..., None] | None = None
    dropped: Callable[[], str] | None = None

    def __init__(self, *, hooks: Any, device: Any, shuffle: Shuffle, training: Callable[[], bool], weigh: bool) -> None:
        self.hooks = hooks
        self.device = device
        self.shuffle = shuffle
        self.training = training
        self.weigh = weigh
        self.epoch = 0
        self.replaced: dict[str, Any] = {}
        self.epoch_setters: list[EpochSetter] = []
        self.sampling_generators: list[Any] = []
        self.transform_generators: Generators = {}
        self.salts: dict[str, int] = {}
        self.passes: list[LoaderPass] = []
        self.resume_from: Mapping[str, Any] | None = None
        self.starting_pass: LoaderPass | None = None
        self.loader: Callable[[], Any] = lambda: None
        self.weights = BatchWeights()
        self.owner = object()

    def plain_dict(self, obj: Any) -> dict[str, Any]:
        """Return the attributes of the plain object."""
        return {**{k: v for k, v in obj.__dict__.items() if k != KEY}, **self.replaced}

    def begin(self) -> LoaderPass:
        """Begin a pass: count the epoch, and set it in samplers and datasets."""
        for setter in self.epoch_setters:
            setter.set_epoch(self.epoch)
        if self.job is not None:
            self.job.begun = True
            self.job.num_passes += 1
        loader_pass = LoaderPass(
            self.epoch, self.sampling_generators, self.transform_generators, even=self._even(), owner=self.owner
        )
        self.starting_pass = loader_pass
        loader_pass.weights, loader_pass.drops = self.weights, self.dropped() if self.dropped is not None else ""
        loader_pass.count, loader_pass.number, loader_pass.unbatched = self.count, self.shuffle.number, self.unbatched
        # A pass without gradients is not an epoch of the training: one rank may evaluate alone, and the order of
        # samples stays equal on all ranks.
        self.epoch += torch.is_grad_enabled()
        if self.iterable is not None:
            self.iterable.begin_epoch(loader_pass.epoch, even=loader_pass.even)
        return loader_pass

    def _even(self) -> bool:
        return self.training() or (self.trained and torch.is_grad_enabled())

    def begin_indices(self) -> Callable[[], PassStart]:
        """Return a function that the sampler calls at its first index of the pass that begins now."""
        assert self.starting_pass is not None
        return functools.partial(self._start_indices, self.starting_pass, self.seeds_workers)

    def _start_indices(self, loader_pass: LoaderPass, seeds_workers: bool) -> PassStart:
        if loader_pass.sampling:
            # A loader class that iterates its sampler again within one pass, such as an endless one: a new epoch.
            again = self.begin()
            loader_pass.epoch, loader_pass.position = again.epoch, 0
            loader_pass.initial_states = again.initial_states
            loader_pass.origin = loader_pass.first = 0
            self.starting_pass = loader_pass
        loader_pass.sampling = True
        skip, loader_pass.skip = loader_pass.skip, 0
        seeds = functools.partial(self.shuffle.seed_of, loader_pass.epoch, self.index) if seeds_workers else None
        return PassStart(
            self.random_stream(loader_pass.epoch),
            loader_pass.even,
            loader_pass.next_shares.append,
            skip,
            seeds,
            trains=lambda: loader_pass.trains,
            # Worker processes read ahead of what the script does.
            pad=lambda: self.one_for_one and (seeds_workers or loader_pass.gathered_at > 0),
            origin=loader_pass.origin,
            first=loader_pass.first,
        )

    def is_evaluating(self, loader_pass: LoaderPass) -> bool:
        """Update a pass by what the script has done with its batches, and return whether it evaluates.

        The purpose of a pass is derived from the gradient and training modes when it begins; a script may set them
        only inside of its loop. A model call with gradients in training mode, or a backward, means training.
        """
        self.weights.update_passes()
        if loader_pass.at_first_batch:
            loader_pass.at_first_batch = False
            loader_pass.ahead = not (loader_pass.model_called or loader_pass.gathered_at)
        if loader_pass.trains and not loader_pass.even:
            # All models are in evaluation mode, as with frozen running statistics, and the pass trains nevertheless.
            self.trained = True
            if self.iterable is not None:
                self.iterable.require_even_steps()
        loader_pass.undecided = not loader_pass.trains
        return loader_pass.model_called and not loader_pass.trains

    def is_padding(self, loader_pass: LoaderPass) -> bool:
        """Drop the next share, of a batch that repeats samples, if an evaluation must not see them twice.

        Raises:
            OrderError: if the loop calls collectives for every batch: the other ranks would wait for this one.
        """
        # Samples that are gathered from all ranks are gathered in every step, and without those of this batch.
        if loader_pass.trains or loader_pass.gathered_at:
            return False
        if not loader_pass.even:
            loader_pass.next_shares.popleft()
            return True
        if not loader_pass.model_called:
            return False
        count = self.weights.num_collectives
        if loader_pass.communicated or (count is not None and count() != loader_pass.num_collectives):
            raise OrderError(
                "This rank has no samples left for the last batch of an evaluation whose loop calls collectives for "
                "every batch. Turn gradients off before the loop, not in it (with torch.no_grad(): for batch in "
                "loader: ...), so that samples are divided for it; call collectives once, after the loop; or use "
                "lite.gather_for_metrics() or lite.reduce_mean() for every batch."
            )
        loader_pass.next_shares.popleft()
        return True

    def compare_window(self, window: str) -> None:
        """Compare the first window of a stream between ranks, once.

        Raises:
            SettingError: if they differ.
        """
        assert self.iterable is not None
        self.iterable.compare = False
        self.iterable.window = None
        compare, self.compare = self.compare, None
        if compare is not None and window:
            compare(digest=window, key=str(self.shuffle.number))

    def record_batch(self, loader_pass: LoaderPass, batch: Any = None) -> None:
        """Record that a batch of a pass is returned."""
        weights = self.weights
        if not loader_pass.started:
            loader_pass.started = True
            weights.begin_pass(loader_pass)
            loader_pass.undecided = self.count > 1
        loader_pass.position += 1
        if loader_pass.next_shares:
            loader_pass.share = share = loader_pass.next_shares.popleft()
            # A batch that repeats samples has weight 0, also with weigh_uneven=False.
            weight = share.weight if self.weigh or not share.weight else 1.0
            loader_pass.mixed |= not loader_pass.at_first_batch and weight != loader_pass.weight
            loader_pass.weight = weight
        if self.passes[-1] is not loader_pass:
            self.passes.remove(loader_pass)
            self.passes.append(loader_pass)
        self.weight = loader_pass.weight
        if self.count > 1:
            self._record_weight(loader_pass, batch)

    def _record_weight(self, loader_pass: LoaderPass, batch: Any) -> None:
        weights = self.weights
        weights.move_to_end(loader_pass)
        loader_pass.num_backwards, loader_pass.num_closed = weights.num_backwards, weights.num_closed
        # Even batches of a plain loop need no record: the loop uses the one that was read last.
        plain = not (loader_pass.at_first_batch or loader_pass.ahead) and len(weights.open_passes) <= 1
        if not plain or loader_pass.weight != 1.0:
            weights.record_batch(loader_pass, batch)
        if weights.uneven:
            weights.forget_current()

    def open(self, loader_pass: LoaderPass) -> None:
        """Record that a pass is being read."""
        if not self.passes and self.job is not None:
            self.job.active.append(self)
        self.passes.append(loader_pass)
        self.weights.open_passes.append(loader_pass)

    def close(self, loader_pass: LoaderPass) -> None:
        """Record that a pass is over; the current weight is that of an enclosing pass, if there is one."""
        self.weights.close_pass(loader_pass)
        self.passes.remove(loader_pass)
        self.weight = self.passes[-1].weight if self.passes else None
        if not self.passes and self.job is not None and self in self.job.active:
            self.job.active.remove(self)

    def capture(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the position of the loader, for a checkpoint: values common to all ranks, and those of this rank."""
        common: dict[str, Any] = {
            "number": self.shuffle.number,
            "seed": self.shuffle.seed,
            "epoch": self.epoch,
            "position": 0,
            "early": self.early,
        }
        if not self.passes:
            return common, {
                "generators": [pack(get_state(generator)) for generator in self.sampling_generators],
                "held": pack_states(self.transform_generators),
            }
        loader_pass = self.passes[-1]
        common["epoch"] = loader_pass.epoch
        rng, sampling, transforms = loader_pass.initial_states
        own: dict[str, Any] = {"generators": [pack(state) for state in sampling]}
        own["held"] = pack_states(self.transform_generators) if self.indexed else transforms
        if self.resumable:
            common["position"] = loader_pass.position
            common.update(origin=loader_pass.origin, first=loader_pass.first, layout=list(self.layout))
            own["rng"] = rng.to_state()
            stream = self.iterable.capture_stream() if self.iterable is not None and loader_pass.position else None
            if stream is not None:
                own["place"] = stream
        elif (loader := self.loader()) is not None:
            common["layout"] = list(self.layout)
            own["loader"] = loader.state_dict()
        return common, own

    def resume(self, common: Mapping[str, Any], own: Mapping[str, Any] | None, *, same: bool) -> None:
        """Make the next pass begin at a position returned by `capture`.

        Args:
            own: the values of one rank; None if no rank saved any.
            same: whether they are those of this rank; if not, only what determines the order of samples is used.

        Raises:
            CheckpointMismatchError: if this loader cannot resume at that position.
        """
        point = resume_point(common, self.layout)
        self.shuffle.seed = common["seed"]
        self.epoch = common["epoch"]
        self.resume_from = None
        if own is None:
            return
        for generator, state in zip(self.sampling_generators, own.get("generators", ()), strict=False):
            set_state(generator, unpack(state))
        if same:
            restore_states(self.transform_generators, own.get("held", {}))
        loader = self.loader()
        if "loader" in own and loader is not None:
            loader.load_state_dict(own["loader"])
            self.position_loaded = True
        if point.position or point.origin:
            self.resume_from = {**point._asdict(), "rng": own.get("rng"), "place": own.get("place")}

    def problem(self, common: Mapping[str, Any], own: Mapping[str, Any] | None) -> str | None:
        """Return why `resume` would fail, None if it would not."""
        try:
            resume_point(common, self.layout)
        except CheckpointMismatchError as error:
            return str(error)
        if own is None:
            return None
        for generator, state in zip(self.sampling_generators, own.get("generators", ()), strict=False):
            if not accepts_state(generator, unpack(state)):
                return f"the state of a {type(generator).__name__} of a loader was saved by another version"
        return rng_state_problem(own["rng"]) if own.get("rng") is not None else None

    def snapshot(self) -> Callable[[], None]:
        """Return a function that undoes `resume`, except a loader's own ``load_state_dict``."""
        before = self.shuffle.seed, self.epoch, self.resume_from, self.position_loaded
        states = [get_state(generator) for generator in self.sampling_generators]
        transforms = pack_states(self.transform_generators)

        def undo() -> None:
            self.shuffle.seed, self.epoch, self.resume_from, self.position_loaded = before
            for generator, state in zip(self.sampling_generators, states, strict=True):
                set_state(generator, state)
            restore_states(self.transform_generators, transforms)

        return undo

    @contextmanager
    def replaying(self, rng: Mapping[str, Any] | None) -> Iterator[None]:
        """Use the random numbers from the beginning of a resumed pass inside the block, if `rng` holds their state."""
        outside = rng_state()
        if rng is not None:
            load_rng_state(rng)
        try:
            yield
        finally:
            load_rng_state(outside)
