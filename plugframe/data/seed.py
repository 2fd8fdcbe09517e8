"""Seed the random generators of the process."""

from __future__ import annotations

import hashlib
import numbers
import os
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from plugframe.errors import SettingError
from plugframe.hooks.variables import JOB_SEED
from plugframe.utils.rng import import_numpy_random

if TYPE_CHECKING:
    from plugframe.data.random_streams import RankStreams

#: The largest seed that every generator accepts.
MAX_SEED = 2**32 - 1
#: The variable that holds the seed if the code passes none, as in Lightning.
GLOBAL_SEED = "PL_GLOBAL_SEED"
#: Variables that identify the job where another launcher has started the ranks.
_JOB_VARIABLES = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")


class ProcessSeed:
    """The latest seed of this process. There is one instance, as a process has one set of global generators.

    Attributes:
        seed: None before the first `seed_everything`.
        drawn: whether the seed was drawn here; it is replaced by that of rank 0 once the ranks can communicate.
        per_rank: the argument of `seed_everything`.
        restored: whether the generators were restored from a checkpoint since.
        common: saved state of the generator that is equal on all ranks; None if all ranks drew the same numbers.
        streams: seeds the ranks differently; None before the first set-up of a model.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.drawn = False
        self.per_rank: bool | None = None
        self.restored = False
        self.common: torch.Tensor | None = None
        self.streams: RankStreams | None = None


#: At module level, since a seed belongs to the process and not to a `Lite`: most scripts seed before they make one.
PROCESS = ProcessSeed()


def seed_everything(
    seed: int | str | None = None,
    workers: bool = False,
    verbose: bool = True,
    *,
    per_rank: bool | None = None,
) -> int:
    """Seed Python's, NumPy's and torch's generators, on every device, and return the seed.

    Every rank must call it, with the same seed. The order of samples depends on the seed alone; loader workers are
    seeded from it too, differently on every rank.

    Args:
        seed: 0 … 2**32 - 1, an integer of any type or its digits. None uses the variable ``PL_GLOBAL_SEED``, or
            draws a seed, which is the same on all ranks from the first set-up on at the latest.
        workers: ignored, for compatibility: loader workers are always seeded.
        verbose: ignored, for compatibility: nothing is printed.
        per_rank: True makes the random numbers (dropout, noise, actions) differ between ranks of the data axis from
            the first set-up of a model on; ranks that read the same batches draw the same numbers. Draws before
            that, and ``random_split``, are equal on all ranks. False keeps all numbers equal. None does too, and
            warns if equal numbers are drawn in training.

    Raises:
        SettingError: if the seed is invalid.
    """
    del workers, verbose
    number, drawn = resolve_seed(seed)
    seed_process(number, drawn=drawn, per_rank=per_rank)
    return number


def seed_process(
    number: int, *, drawn: bool, per_rank: bool | None, device: Callable[[int], None] | None = None
) -> None:
    """Seed the generators of this process, and those of its device by ``device(seed)``; see `seed_everything`."""
    if per_rank is not None and not isinstance(per_rank, bool):
        raise SettingError(f"per_rank={per_rank!r} of seed_everything() must be True, False or None.")
    PROCESS.seed, PROCESS.drawn, PROCESS.per_rank = number, drawn, per_rank
    PROCESS.restored, PROCESS.common = False, None
    seed_generators(number)
    if device is not None:
        device(number)
    if PROCESS.streams is not None:
        PROCESS.streams.on_seed(PROCESS)


def checked_seed(seed: Any, what: str) -> int:
    """Return a seed as an ``int``.

    Raises:
        SettingError: if it is invalid; the message calls it `what`.
    """
    # NumPy's integers are Integral, its booleans are not.
    integral = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    text = seed if isinstance(seed, str) else ""
    digits = text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_SEED))
    number = int(seed) if integral or digits else -1
    if not 0 <= number <= MAX_SEED:
        raise SettingError(f"{what} is not a seed: pass an integer from 0 to {MAX_SEED}.")
    return number


def resolve_seed(seed: Any) -> tuple[int, bool]:
    """Return the seed from the code, the environment or a draw; and whether it was drawn.

    Raises:
        SettingError: if the seed is invalid.
    """
    if seed is not None:
        return checked_seed(seed, f"seed={seed!r}"), False
    given = os.environ.get(GLOBAL_SEED)
    if given:
        return checked_seed(given, f"{GLOBAL_SEED}={given!r} in the environment"), False
    shared = os.environ.get(JOB_SEED)
    if not shared and os.environ.get("WORLD_SIZE", "1") != "1":
        shared = " ".join(filter(None, map(os.environ.get, _JOB_VARIABLES)))
    return mix(shared) if shared else random.SystemRandom().randint(0, MAX_SEED), True


def mix(*values: Any) -> int:
    """Return a seed that depends on all `values`, which are plain."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=4).digest(), "little")


def seed_generators(seed: int) -> None:
    """Seed the global generators of this process."""
    random.seed(seed)
    torch.manual_seed(seed)
    # Imported even if the program has not: code that it imports later must start from the seed too.
    numpy = import_numpy_random()
    if numpy:
        numpy.seed(seed)
