"""Generators of the user's own: found where a loader draws from them, and their states taken and put."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import torch
from torch import Tensor


def random_sources(*owners: Any) -> list[Any]:
    """Return the random generators, of torch, Python and NumPy, that are attributes of `owners`."""
    found: dict[int, Any] = {}
    for owner in owners:
        for value in getattr(owner, "__dict__", {}).values():
            if is_source(value):
                found[id(value)] = value
    return list(found.values())


def is_source(value: Any) -> bool:
    """Say whether a value is a random generator with a state."""
    if isinstance(value, (torch.Generator, random.Random)):
        return not isinstance(value, random.SystemRandom)  # which has no state
    numpy = sys.modules.get("numpy.random")
    return numpy is not None and isinstance(value, (numpy.Generator, numpy.RandomState))


def get_state(source: Any) -> Any:
    """Return the state of a generator."""
    if isinstance(source, torch.Generator):
        return source.get_state()
    if isinstance(source, random.Random):
        return source.getstate()
    return source.bit_generator.state if hasattr(source, "bit_generator") else source.get_state(legacy=False)


def set_state(source: Any, state: Any) -> None:
    """Put back what `get_state` gave."""
    if isinstance(source, torch.Generator):
        source.set_state(state)
    elif isinstance(source, random.Random):
        source.setstate(state)
    elif hasattr(source, "bit_generator"):
        source.bit_generator.state = state
    else:
        source.set_state(state)


def fits(source: Any, state: Any) -> bool:
    """Say whether a generator would take a state; `source` itself is not touched."""
    fresh: Any
    if isinstance(source, torch.Generator):
        fresh = torch.Generator(device=source.device)
    elif isinstance(source, random.Random):
        fresh = random.Random()
    else:
        import numpy

        kind = getattr(source, "bit_generator", None)
        fresh = numpy.random.RandomState() if kind is None else numpy.random.Generator(type(kind)())
    try:
        set_state(fresh, state)
    except Exception:  # noqa: BLE001 a file may hold anything
        return False
    return True


def pack(state: Any) -> Any:
    """Return a state as a tensor or a text, which a checkpoint can hold: NumPy's have numbers of 128 bits."""
    return state if isinstance(state, Tensor) else json.dumps(_to_json(state))


def unpack(packed: Any) -> Any:
    """Return what was given to `pack`."""
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


def has_state(value: Any) -> bool:
    """Say whether a value is an object that gives and takes a ``state_dict``."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))
