"""Detect ranks that draw equal random numbers in training, or different ones within one tensor group."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from plugframe.data.loaders import Loaders
from plugframe.data.seed import PROCESS
from plugframe.errors import OutOfSyncError
from plugframe.utils.logging import tell
from plugframe.utils.rng import capture_rng

#: The compared streams, in the order of the gathered numbers.
_STREAMS = ("the model (dropout and the like)", "the loop by torch", "the loop by random", "the loop by numpy")
#: Gathered for a stream that cannot be compared: a pass over a loader began, which draws a number itself.
_UNKNOWN = -1
#: Number of forwards observed, and of steps after which the check ends: several, since two models in turn make a
#: round of the loop two or more steps. Where every step begins a pass there are more.
_MAX_FORWARDS, _STEPS, _MAX_STEPS = 16, 4, 8
#: Last step of the check in a script without loaders. It may draw between many steps only, as for a round of games; it
#: is checked at steps that are powers of two.
_LAST_STEP = 512


class RandomStreamCheck:
    """Compares the ranks' random numbers after the first optimizer steps of a job.

    A few numbers are gathered at each of those steps; later steps cost nothing. The loop's draws are those outside of
    the model, from the end of one step to the end of the next.

    Args:
        index: data shard of this rank; ranks with the same index must draw the same numbers.
        hooks: hooks of the job.
        context: context of the job.
        loaders: loaders of the job.
    """

    def __init__(self, *, index: int, hooks: Any, context: Any, loaders: Loaders) -> None:
        self._index = index
        self._hooks = hooks
        self._context = context
        self._loaders = loaders
        self._num_forwards = 0
        self._num_steps = 0
        self._model_digest = 0
        self._loop_digests: list[int] = []
        self._num_passes = 0
        self._drawn: set[int] = set()

    def before_forward(self) -> int | None:
        """Return the argument for `after_forward`, None if this call is not observed."""
        if self._model_digest or self._num_forwards >= _MAX_FORWARDS or not torch.is_grad_enabled():
            return None
        self._num_forwards += 1
        return self._torch_digest()

    def after_forward(self, before: int) -> None:
        """Record whether the model drew random numbers."""
        if self._torch_digest() != before:
            self._model_digest = before

    def after_step(self) -> bool:
        """Compare, and return whether the check is complete. Every rank must call it after an optimizer step.

        Raises:
            OutOfSyncError: on all ranks, if the ranks of a tensor group drew different numbers for the same data.
        """
        self._num_steps += 1
        if self._num_steps > _MAX_STEPS and self._num_steps & (self._num_steps - 1):
            return False
        row = [self._index, self._model_digest, *self._loop_row(), self._loaders.num_passes]
        sent = torch.tensor(row, dtype=torch.int64, device=self._context.device)
        rows = self._hooks.collective_all_gather(tensor=sent, group=None, sync_grads=False).tolist()
        reads = max(row.pop() for row in rows)  # of any rank: all must end the check at the same step
        _check_groups(rows)
        equal = _equal_streams(rows)
        if equal and self._context.world.global_rank == 0 and PROCESS.per_rank is None:
            tell(
                f"All ranks drew the same random numbers in training: {', '.join(equal)}. "
                "lite.seed_everything(seed, per_rank=True) makes them differ; per_rank=False keeps them equal without "
                "this warning.",
                warn=True,
            )
        incomplete = self._num_steps < _STEPS or any(_UNKNOWN in row[2:] for row in rows)
        self._drawn |= {number for row in rows for number, digest in enumerate(row[2:]) if digest > 0}
        if not reads and len(self._drawn) < len(_STREAMS) - 1:
            if equal or self._num_steps >= _LAST_STEP:
                return True
        elif equal or not incomplete or self._num_steps >= _MAX_STEPS:
            return True
        self._loop_digests, self._num_passes = self._digests(), self._loaders.num_passes
        return False

    def _loop_row(self) -> list[int]:
        if not self._loop_digests:
            return [0, 0, 0]
        if self._num_passes != self._loaders.num_passes:
            return [_UNKNOWN] * 3
        pairs = zip(self._loop_digests, self._digests(), strict=True)
        return [before if now != before else 0 for before, now in pairs]

    def _digests(self) -> list[int]:
        snapshot = capture_rng()
        numpy_digest = 0
        if snapshot.numpy is not None:
            name, keys, *rest = snapshot.numpy
            numpy_digest = _digest([name, keys.tolist(), rest])
        return [self._torch_digest(), _digest(snapshot.python), numpy_digest]

    def _torch_digest(self) -> int:
        on_device = self._hooks.accelerator_rng_state(device=self._context.device)
        return _digest([torch.get_rng_state().tolist(), None if on_device is None else on_device.tolist()])


def _digest(state: Any) -> int:
    """Return a positive hash of a state."""
    return int.from_bytes(hashlib.blake2b(repr(state).encode(), digest_size=7).digest(), "little") + 1


def _equal_streams(rows: Sequence[Sequence[int]]) -> list[str]:
    """Return the streams that all ranks of the data axis drew from equal states."""
    if len({row[0] for row in rows}) < 2:
        return []
    columns = list(zip(*(row[1:] for row in rows), strict=True))
    return [name for name, column in zip(_STREAMS, columns, strict=True) if len(set(column)) == 1 and column[0] > 0]


def _check_groups(rows: Sequence[Sequence[int]]) -> None:
    first: dict[int, tuple[int, int]] = {}
    for rank, (index, model, *_) in enumerate(rows):
        other, drawn = first.setdefault(index, (rank, model))
        if model and drawn and model != drawn:
            raise OutOfSyncError(
                f"Ranks {other} and {rank} read the same batches, and the model drew different random numbers on them "
                "(dropout): draw from torch's generator on both or on none, after lite.seed_everything(seed) on both."
            )
