"""Finding ranks that draw the same random numbers in training, or, in one tensor group, different ones."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch

from plugframe.data.loaders import Loaders
from plugframe.data.seed import PROCESS
from plugframe.errors import OutOfSyncError
from plugframe.utils.logging import tell

#: What is compared, in the order in which it is sent.
_WHAT = ("the model (dropout and the like)", "the loop by torch", "the loop by random", "the loop by numpy")
#: Sent for what cannot be told yet: a pass over a loader began meanwhile, which draws a number itself.
_UNKNOWN = -1
#: How many forwards are looked at, and after how many steps the ranks compare: two models in turn make a round of the
#: loop two or more steps. Where every step begins a pass there are some more.
_FORWARDS, _STEPS, _MOST_STEPS = 16, 4, 8


class DrawCheck:
    """Compares the ranks' random numbers after the first optimizer steps of a job, and never again.

    A few numbers are exchanged at each of those: later steps cost what they did. What the loop draws outside of the
    model is what is drawn from the end of one step to the end of the next.

    Args:
        index: of this rank's share of the data; ranks with equal index must draw alike.
        hooks: those of the job.
        context: of the job.
        loaders: those of the job.
    """

    def __init__(self, *, index: int, hooks: Any, context: Any, loaders: Loaders) -> None:
        self._index = index
        self._hooks = hooks
        self._context = context
        self._loaders = loaders
        self._forwards = 0
        self._steps = 0
        self._model = 0
        self._before: list[int] = []
        self._passes = 0

    def enter(self) -> int | None:
        """Note that a model is called; return what `leave` wants, None if this call is not looked at."""
        if self._model or self._forwards >= _FORWARDS or not torch.is_grad_enabled():
            return None
        self._forwards += 1
        return self._of_torch()

    def leave(self, before: int) -> None:
        """Note that the model returned."""
        if self._of_torch() != before:
            self._model = before

    def at_step(self) -> bool:
        """Compare, and return whether the check is over. Called on every rank after an optimizer step.

        Raises:
            OutOfSyncError: on all ranks, if the ranks of a tensor group drew different numbers for the same data.
        """
        self._steps += 1
        mine = [self._index, self._model, *self._of_loop()]
        sent = torch.tensor(mine, dtype=torch.int64, device=self._context.device)
        rows = self._hooks.collective_all_gather(tensor=sent, group=None, sync_grads=False).tolist()
        _check_groups(rows)
        same = _same(rows)
        if same and self._context.world.global_rank == 0 and PROCESS.per_rank is None:
            tell(
                f"All ranks drew the same random numbers in training: {', '.join(same)}. lite.seed_everything(seed, "
                "per_rank=True) gives each its own; per_rank=False says that equal ones are meant.",
                warn=True,
            )
        waiting = self._steps < _STEPS or any(_UNKNOWN in row[2:] for row in rows)
        if same or not waiting or self._steps >= _MOST_STEPS:
            return True
        self._before, self._passes = self._all(), self._loaders.passes
        return False

    def _of_loop(self) -> list[int]:
        if not self._before:
            return [0, 0, 0]
        if self._passes != self._loaders.passes:
            return [_UNKNOWN] * 3
        return [was if now != was else 0 for was, now in zip(self._before, self._all(), strict=True)]

    def _all(self) -> list[int]:
        numpy = sys.modules.get("numpy.random")
        return [self._of_torch(), _digest(random.getstate()), _digest(_numpy_state(numpy)) if numpy else 0]

    def _of_torch(self) -> int:
        on_device = self._hooks.accelerator_rng_state(device=self._context.device)
        return _digest([torch.get_rng_state().tolist(), None if on_device is None else on_device.tolist()])


def _numpy_state(numpy: Any) -> Any:
    name, keys, *rest = numpy.get_state()
    return [name, keys.tolist(), rest]


def _digest(state: Any) -> int:
    """Return a positive number for a state."""
    return int.from_bytes(hashlib.blake2b(repr(state).encode(), digest_size=7).digest(), "little") + 1


def _same(rows: Sequence[Sequence[int]]) -> list[str]:
    """Say what all ranks of the data axis have drawn from equal states."""
    if len({row[0] for row in rows}) < 2:
        return []
    columns = list(zip(*(row[1:] for row in rows), strict=True))
    return [what for what, column in zip(_WHAT, columns, strict=True) if len(set(column)) == 1 and column[0] > 0]


def _check_groups(rows: Sequence[Sequence[int]]) -> None:
    first: dict[int, tuple[int, int]] = {}
    for rank, (index, model, *_) in enumerate(rows):
        other, drawn = first.setdefault(index, (rank, model))
        if model and drawn and model != drawn:
            raise OutOfSyncError(
                f"Ranks {other} and {rank} read the same batches, and the model drew different random numbers on them "
                "(dropout): draw from torch's generator on both or on none, after lite.seed_everything(seed) on both."
            )
