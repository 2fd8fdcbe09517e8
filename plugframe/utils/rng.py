"""Random generators of torch, Python and NumPy: their states, and snapshots of those of the process."""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Api(NamedTuple):
    """How to use one type of generator.

    Attributes:
        make: returns a new generator of the same type as the given one.
    """

    get_state: Callable[[Any], Any]
    set_state: Callable[[Any, Any], object]
    seed: Callable[[Any, int], object]
    make: Callable[[Any], Any]


_TORCH = _Api(
    get_state=lambda generator: generator.get_state(),
    set_state=lambda generator, state: generator.set_state(state),
    seed=lambda generator, seed: generator.manual_seed(seed),
    make=lambda generator: torch.Generator(device=generator.device),
)
_PYTHON = _Api(
    get_state=lambda generator: generator.getstate(),
    set_state=lambda generator, state: generator.setstate(state),
    seed=lambda generator, seed: generator.seed(seed),
    make=lambda _: random.Random(),
)
_NUMPY = _Api(
    get_state=lambda generator: generator.bit_generator.state,
    set_state=lambda generator, state: setattr(generator.bit_generator, "state", state),
    seed=lambda generator, seed: setattr(generator.bit_generator, "state", type(generator.bit_generator)(seed).state),
    make=lambda generator: sys.modules["numpy.random"].Generator(type(generator.bit_generator)()),
)
_NUMPY_LEGACY = _Api(
    get_state=lambda generator: generator.get_state(legacy=False),
    set_state=lambda generator, state: generator.set_state(state),
    seed=lambda generator, seed: generator.seed(seed % 2**32),  # RandomState takes 32 bits
    make=lambda _: sys.modules["numpy.random"].RandomState(),
)


def _find_api(value: Any) -> _Api | None:
    if isinstance(value, torch.Generator):
        return _TORCH
    if isinstance(value, random.Random):
        return None if isinstance(value, random.SystemRandom) else _PYTHON  # a SystemRandom has no state
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None and isinstance(value, numpy.Generator):
        return _NUMPY
    return _NUMPY_LEGACY if numpy is not None and isinstance(value, numpy.RandomState) else None


def _api(generator: Any) -> _Api:
    api = _find_api(generator)
    assert api is not None, f"{generator!r} is not a random generator"
    return api


def is_generator(value: Any) -> bool:
    """Return whether a value is a random generator with a state."""
    return _find_api(value) is not None


def get_state(generator: Any) -> Any:
    """Return the state of a generator."""
    return _api(generator).get_state(generator)


def set_state(generator: Any, state: Any) -> None:
    """Restore a state returned by `get_state`."""
    _api(generator).set_state(generator, state)


def seed_generator(generator: Any, seed: int) -> None:
    """Seed a generator with an integer of up to 63 bits."""
    _api(generator).seed(generator, seed)


def accepts_state(generator: Any, state: Any) -> bool:
    """Return whether a generator of the same type accepts a state; `generator` itself is unchanged."""
    api = _api(generator)
    try:
        api.set_state(api.make(generator), state)
    except Exception:  # noqa: BLE001 a file may hold anything
        return False
    return True


def pack(state: Any) -> Any:
    """Return a generator's state as a tensor or a string, for a checkpoint: NumPy's states hold 128-bit integers."""
    return state if isinstance(state, Tensor) else json.dumps(_to_json(state))


def unpack(packed: Any) -> Any:
    """Return the state that was given to `pack`."""
    return packed.to(torch.uint8) if isinstance(packed, Tensor) else _from_json(json.loads(packed))


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return {"tuple": [_to_json(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": {key: _to_json(item) for key, item in value.items()}}
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    return value


def _from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_from_json(item) for item in value["tuple"])
    if "dict" in value:
        return {key: _from_json(item) for key, item in value["dict"].items()}
    import numpy

    return numpy.array(value["array"], dtype=value["dtype"])


class RngSnapshot(NamedTuple):
    """States of the process's global CPU generators.

    Attributes:
        torch: of ``torch.default_generator``.
        python: of the module ``random``.
        numpy: of ``numpy.random``; None if the program does not import NumPy, or if it was not captured.
    """

    torch: Tensor
    python: Any
    numpy: Any = None

    def restore(self) -> None:
        """Set the global generators to these states."""
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        if self.numpy is not None:
            numpy: Any = sys.modules["numpy.random"]
            numpy.set_state(self.numpy)

    def to_state(self) -> dict[str, Any]:
        """Return the snapshot as tensors and plain values, for a checkpoint."""
        version, words, gauss = self.python
        words_tensor = torch.tensor(words, dtype=torch.int64)
        state = {"torch": self.torch, "python": {"version": version, "words": words_tensor, "gauss": gauss}}
        if self.numpy is not None:
            name, keys, position, has_gauss, cached = self.numpy
            keys_tensor = torch.tensor(keys.tolist(), dtype=torch.int64)
            state["numpy"] = {"name": name, "keys": keys_tensor, "rest": [position, has_gauss, cached]}
        return state


def capture_rng(*, numpy: bool = True) -> RngSnapshot:
    """Return the states of the process's global CPU generators.

    Args:
        numpy: whether to capture NumPy's state, which takes 100 µs.
    """
    module: Any = sys.modules.get("numpy.random") if numpy else None
    return RngSnapshot(torch.get_rng_state(), random.getstate(), module.get_state() if module else None)


def rng_state() -> dict[str, Any]:
    """Return the states of the process's global CPU generators as tensors and plain values, for a checkpoint."""
    return capture_rng().to_state()


def load_rng_state(state: Any) -> None:
    """Set the global CPU generators to a state returned by `rng_state`."""
    numpy = import_numpy_random() if "numpy" in state else None
    _load(state, torch.default_generator, random, numpy)


def rng_state_problem(state: Any) -> str | None:
    """Return why `load_rng_state` would fail, None if it would not; no global generator is changed."""
    numpy_generator = None
    try:
        if "numpy" in state:
            numpy = import_numpy_random()
            if numpy is None:
                return "the checkpoint holds a state of NumPy's generator, and NumPy is not installed"
            numpy_generator = numpy.RandomState()
        _load(state, torch.Generator(), random.Random(), numpy_generator)
    except _StateRefusedError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 a file may hold anything
        return f"the states of the random generators are invalid: {type(error).__name__}: {error}"
    return None


class _StateRefusedError(ValueError):
    """The installed version of a library refuses the state of its generator."""


def import_numpy_random() -> Any:
    """Return the module ``numpy.random``, None if NumPy is not installed."""
    return importlib.import_module("numpy.random") if importlib.util.find_spec("numpy") else None


def _load(state: Any, torch_generator: torch.Generator, python_generator: Any, numpy_generator: Any) -> None:
    with _refusal("torch's generator", f"torch {torch.__version__}"):
        torch_generator.set_state(state["torch"].to(torch.uint8))
    with _refusal("Python's generator", f"Python {platform.python_version()}"):
        python = state["python"]
        python_generator.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if numpy_generator is not None:
        import numpy

        with _refusal("NumPy's generator", f"NumPy {numpy.__version__}"):
            saved = state["numpy"]
            keys = numpy.array(saved["keys"].tolist(), dtype=numpy.uint32)
            numpy_generator.set_state((saved["name"], keys, *saved["rest"]))


@contextmanager
def _refusal(what: str, version: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _StateRefusedError(
            f"the state of {what} was saved by another version, and {version} does not accept it "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error
