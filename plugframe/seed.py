"""Seeding every generator a training draws from."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from plugframe.errors import SettingError

#: What every generator of 32 bits and more accepts.
MAX_SEED = 2**32 - 1


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed Python's, NumPy's and torch's generators, on every device, and return the seed.

    Every rank that is to have equal initial weights must call it, with the same seed. Loader workers are seeded
    from it in any case, differently on every rank; the order of samples depends on it alone.

    Args:
        seed: 0 … 2**32 - 1; None draws one from the operating system.
        workers: accepted for scripts that pass it; loader workers are always seeded.
        verbose: accepted for scripts that pass it; nothing is printed.

    Raises:
        SettingError: for any other seed.
    """
    del workers, verbose
    if seed is None:
        seed = random.SystemRandom().randint(0, MAX_SEED)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise SettingError(f"seed={seed!r} is not a seed: it is a whole number from 0 to {MAX_SEED}.")
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = _numpy()
    if numpy:
        numpy.seed(seed)
    return seed


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
