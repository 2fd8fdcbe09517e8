"""One pass over a loader."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from plugframe.data.generators import Generators, pack_states
from plugframe.utils.rng import capture_rng, get_state

if TYPE_CHECKING:
    from plugframe.data.batch_index import BatchRecord
    from plugframe.data.batch_weights import BatchWeights
    from plugframe.data.sharding import Share


class LoaderPass:
    """One pass over a loader, from ``iter(loader)`` to its end.

    Attributes:
        epoch: number of the epoch.
        position: number of batches returned.
        share: the part of the data that the batch returned last holds; None if it is unknown.
        weight: of the batch returned last.
        next_shares: of the batches that were made since, in order.
        skip: number of batches to leave out at the beginning.
        origin: what all ranks together had read of the epoch when their number last changed: samples, or batches of
            a batch sampler; positions count from there.
        first: number of the first batch from there, from which its random numbers derive.
        sampling: whether the sampler was iterated.
        initial_states: states at the beginning: of the process's generators, the sampling and the transform generators.
        owner: identifies the loader; not its state, which would keep itself alive.
        count: number of data shards.
        even: whether it began as a pass of the training, in which every rank takes part in every step.
        started: whether a batch was returned.
        at_first_batch: whether the second batch was not requested yet.
        undecided: whether the pass may turn out to be read ahead, or not to train.
        mixed: whether its batches so far have different weights.
        ahead: whether the second batch was requested before a model was called with the first, or it was gathered.
        model_called: whether a model was called since the first batch was returned.
        trains: whether a model was called in training mode with gradients, or `backward`.
        communicated: whether the script called a collective since.
        num_collectives: number of collectives at the beginning; None where they cannot be counted.
        closed: whether the pass is over.
        num_backwards: number of backwards when the last batch was returned.
        records: the recorded batches that may still be trained on.
        number: number of the loader.
        unbatched: whether the loader returns samples of the dataset as they are (each may be a batch).
        gathered_at: number of the last batch for which samples were gathered from all ranks; 0 for none.
        num_evaluations: number of model calls in evaluation mode when samples were gathered last.
        num_closed: number of passes of the job that were over when the last batch was returned.
        weights: weights of the batches of the job.
        weights_given: of the calls of ``reduce_mean`` in the pass; None before the first.
        drops: an error message, if the pass leaves out samples that one process would read; else empty.
    """

    count = 1
    number = 0
    unbatched = False
    share: Share | None = None
    gathered_at = num_evaluations = num_closed = 0
    weights: BatchWeights | None = None
    weights_given: Any = None
    drops = ""
    closed = started = undecided = mixed = ahead = model_called = trains = communicated = False

    def __init__(
        self, epoch: int, sampling: list[Any], transforms: Generators, *, even: bool, owner: Any = None
    ) -> None:
        self.epoch = epoch
        self.even = even
        self.owner = owner
        self.at_first_batch = True
        self.num_backwards = 0
        self.num_collectives: int | None = None
        self.records: deque[BatchRecord] = deque()
        self.position = 0
        self.weight = 1.0
        self.next_shares: deque[Share] = deque()
        self.skip = 0
        self.origin = 0
        self.first = 0
        self.sampling = False
        self.initial_states = (capture_rng(), [get_state(generator) for generator in sampling], pack_states(transforms))
