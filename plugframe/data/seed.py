"""Seeding every generator a training draws from."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import numbers
import os
import platform
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from plugframe.errors import SettingError
from plugframe.hooks.variables import JOB_SEED

if TYPE_CHECKING:
    from plugframe.data.random_streams import RankStreams

#: What every generator of 32 bits and more accepts.
MAX_SEED = 2**32 - 1
#: Gives the seed where the code gives none, as in Lightning.
GLOBAL_SEED = "PL_GLOBAL_SEED"
#: Tell one job from another where some other launcher has started the ranks.
_MEETING = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")


class ProcessSeed:
    """How this process was seeded last. There is one, as there is one set of global generators in a process.

    Attributes:
        seed: None before the first `seed_everything`.
        drawn: whether the seed was drawn here: then it must be rank 0's on all ranks once they can communicate.
        per_rank: what `seed_everything` was told; None if nothing.
        restored: whether its generators were put back from a checkpoint since.
        common: the state of the numbers that are equal on all ranks there; None if all were.
        streams: gives each rank its own numbers; None before the first set-up of a model.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.drawn = False
        self.per_rank: bool | None = None
        self.restored = False
        self.common: torch.Tensor | None = None
        self.streams: RankStreams | None = None


#: Seeds belong to the process and not to a `Lite`: most scripts seed before they make one.
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
        seed: 0 … 2**32 - 1, an integer of any kind or its digits. None takes that of the variable
            ``PL_GLOBAL_SEED``, or draws one: the same on all ranks, once they can communicate at the latest.
        workers: accepted for scripts that pass it; loader workers are always seeded.
        verbose: accepted for scripts that pass it; nothing is printed.
        per_rank: True gives each rank of the data axis its own numbers (dropout, noise, actions) from the first
            set-up of a model on, derived from the seed; ranks that read the same batches go on drawing alike. What
            is drawn before, and by ``random_split``, is equal on all ranks. False leaves all numbers equal. None
            does too, and one line says so if that shows in training.

    Raises:
        SettingError: for any other seed.
    """
    del workers, verbose
    number, drawn = found_seed(seed)
    seed_process(number, drawn=drawn, per_rank=per_rank)
    return number


def seed_process(
    number: int, *, drawn: bool, per_rank: bool | None, device: Callable[[int], None] | None = None
) -> None:
    """Seed the generators of this process, and those of its device with `device`; see `seed_everything`."""
    if per_rank is not None and not isinstance(per_rank, bool):
        raise SettingError(f"per_rank={per_rank!r} of seed_everything() must be True, False or None.")
    PROCESS.seed, PROCESS.drawn, PROCESS.per_rank = number, drawn, per_rank
    PROCESS.restored, PROCESS.common = False, None
    seed_generators(number)
    if device is not None:
        device(number)
    if PROCESS.streams is not None:
        PROCESS.streams.seeded(PROCESS)


def checked_seed(seed: Any, what: str) -> int:
    """Return a seed as an ``int``.

    Raises:
        SettingError: if it is none, naming it as `what`.
    """
    # Integral is what NumPy's integers are too, and its booleans are not.
    whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    text = seed if isinstance(seed, str) else ""
    digits = text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_SEED))
    number = int(seed) if whole or digits else -1
    if not 0 <= number <= MAX_SEED:
        raise SettingError(f"{what} is not a seed: it is a whole number from 0 to {MAX_SEED}.")
    return number


def found_seed(seed: Any) -> tuple[int, bool]:
    """Return the seed the code gives, or the environment, or one that is drawn; and whether it was drawn.

    Raises:
        SettingError: if what is given is no seed.
    """
    if seed is not None:
        return checked_seed(seed, f"seed={seed!r}"), False
    given = os.environ.get(GLOBAL_SEED)
    if given:
        return checked_seed(given, f"{GLOBAL_SEED}={given!r} in the environment"), False
    shared = os.environ.get(JOB_SEED)
    if not shared and os.environ.get("WORLD_SIZE", "1") != "1":
        shared = " ".join(filter(None, map(os.environ.get, _MEETING)))
    return mix(shared) if shared else random.SystemRandom().randint(0, MAX_SEED), True


def mix(*parts: Any) -> int:
    """Return a seed that depends on all `parts`, which are plain values."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


def seed_generators(seed: int) -> None:
    """Seed the global generators of this process."""
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = _numpy()
    if numpy:
        numpy.seed(seed)


def _numpy() -> Any:
    # Imported even if the program has not yet: what it imports later must start from the seed as well.
    return importlib.import_module("numpy.random") if importlib.util.find_spec("numpy") else None


def take_rng() -> tuple[Any, Any, Any]:
    """Return the states of this process's CPU generators as they are; NumPy's only if the program uses it."""
    numpy = sys.modules.get("numpy.random")
    return torch.get_rng_state(), random.getstate(), numpy.get_state() if numpy else None


def rng_state(taken: tuple[Any, Any, Any] | None = None) -> dict[str, Any]:
    """Return the states of this process's CPU generators, or those that were taken, as tensors and plain values."""
    of_torch, (version, words, gauss), of_numpy = taken or take_rng()
    state: dict[str, Any] = {
        "torch": of_torch,
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
    }
    if of_numpy is not None:
        name, keys, position, has_gauss, cached = of_numpy
        keys_tensor = torch.tensor(keys.tolist(), dtype=torch.int64)
        state["numpy"] = {"name": name, "keys": keys_tensor, "rest": [position, has_gauss, cached]}
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` gave."""
    _put(state, torch.default_generator, random, _numpy() if "numpy" in state else None)


def rng_problem(state: Any) -> str | None:
    """Return why `set_rng_state` would fail, None if it would not; no generator of the process is touched."""
    own = None
    try:
        if "numpy" in state:
            numpy = _numpy()
            if numpy is None:
                return "the state of NumPy's generator has no place: NumPy is not installed"
            own = numpy.RandomState()
        _put(state, torch.Generator(), random.Random(), own)
    except _Unfit as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 a file may hold anything
        return f"the states of the random generators are none: {type(error).__name__}: {error}"
    return None


class _Unfit(ValueError):
    """The state of a generator is not one of the version that is here."""


def _put(state: Any, of_torch: torch.Generator, of_python: Any, of_numpy: Any) -> None:
    with _unfit("torch's generator", f"torch {torch.__version__}"):
        of_torch.set_state(state["torch"].to(torch.uint8))
    with _unfit("Python's generator", f"Python {platform.python_version()}"):
        python = state["python"]
        of_python.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if of_numpy is not None:
        import numpy

        with _unfit("NumPy's generator", f"NumPy {numpy.__version__}"):
            kept = state["numpy"]
            keys = numpy.array(kept["keys"].tolist(), dtype=numpy.uint32)
            of_numpy.set_state((kept["name"], keys, *kept["rest"]))


@contextmanager
def _unfit(what: str, version: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _Unfit(
            f"the state of {what} was saved by another version, {version} does not take it "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error
