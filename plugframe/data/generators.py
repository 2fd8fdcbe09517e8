"""Generators that a data set, its transforms or a ``collate_fn`` hold: found, and seeded apart."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

from plugframe.data.random_sources import get_state, is_source, pack, set_state, unpack
from plugframe.utils.own_packages import own_packages
from plugframe.utils.proxy import StandIn

#: By where they are held, as in ``"dataset.transforms.1.rng"``.
Held = dict[str, Any]

#: How deep they are looked for, in containers of how many items (a list of samples is none of transforms), and in
#: how many objects at most.
_DEPTH, _ITEMS, _OBJECTS = 6, 64, 1000
_LEAVES = (str, bytes, int, float, bool, complex, type(None), type, ModuleType, BuiltinFunctionType, Tensor)
#: Packages of others whose objects hold no generator of the user's.
_FOREIGN = ("torch", "builtins", "typing", "threading", "multiprocessing")


def held_sources(*, module_level: bool = True, **owners: Any) -> Held:
    """Return the generators of torch, Python and NumPy that `owners` hold, each once; none of the process's own.

    Args:
        module_level: whether to look among the globals that the owners' functions name, too.
    """
    found: Held = {}
    seen = _process_sources()
    waiting = deque((name, owner, 0) for name, owner in owners.items())
    while waiting and len(seen) < _OBJECTS:
        path, value, depth = waiting.popleft()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen.add(id(value))
        if is_source(value):
            found[path] = value
        elif depth < _DEPTH:
            parts = _parts(value, module_level)
            waiting.extend((f"{path}.{name}" if name else path, part, depth + 1) for name, part in parts)
    return found


def _process_sources() -> set[int]:
    numpy = sys.modules.get("numpy.random")
    functions = [random.random, *([numpy.random] if numpy else [])]
    return {id(torch.default_generator), *(id(getattr(function, "__self__", None)) for function in functions)}


def _parts(value: Any, module_level: bool) -> Iterator[tuple[str, Any]]:
    cls = type(value)  # not __class__: what stands in for an object of the user's has that one's
    if issubclass(cls, StandIn):
        yield "", value._inner
    elif issubclass(cls, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif issubclass(cls, MethodType):
        yield "self", value.__self__
    elif issubclass(cls, FunctionType):
        yield from _enclosed(value)
        yield from _named(value) if module_level else ()
    elif cls.__module__.partition(".")[0] not in ("threading", "multiprocessing", "plugframe"):
        if issubclass(cls, (list, tuple, dict)) and len(value) <= _ITEMS:
            yield from ((str(k), v) for k, v in (value.items() if issubclass(cls, dict) else enumerate(value)))
        yield from _attributes(value).items()
        yield from _named_by(cls) if module_level else ()


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots included."""
    held: dict[str, Any] = dict(getattr(value, "__dict__", None) or {})
    for klass in type(value).__mro__:
        slots = klass.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if isinstance(name, str) and not name.startswith("__") and hasattr(value, name):
                held[name] = getattr(value, name)
    return held


def _enclosed(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents


def _named(function: FunctionType) -> list[tuple[str, Any]]:
    """Return the generators among the globals that a function names."""
    named = ((name, function.__globals__.get(name)) for name in function.__code__.co_names)
    return [(name, value) for name, value in named if is_source(value)]


def _named_by(cls: type) -> list[tuple[str, Any]]:
    """Return the generators among the globals that the methods of a class name."""
    found: list[tuple[str, Any]] = []
    for klass in cls.__mro__:
        package = klass.__module__.partition(".")[0]
        if package not in _FOREIGN and package not in own_packages():
            for name, method in vars(klass).items():
                if isinstance(method, FunctionType):
                    found += [(f"{name}.{key}", value) for key, value in _named(method)]
    return found


def pack_held(held: Held) -> dict[str, Any]:
    """Return the states of generators, for a checkpoint."""
    return {path: pack(get_state(source)) for path, source in held.items()}


def unpack_held(held: Held, states: Mapping[str, Any]) -> None:
    """Put back what `pack_held` gave."""
    for path in held.keys() & states.keys():
        set_state(held[path], unpack(states[path]))


def salts(held: Held) -> dict[str, int]:
    """Return a number for each generator that depends on its state: generators seeded differently stay different."""
    return {path: _salt(source) for path, source in held.items()}


def _salt(source: Any) -> int:
    packed = pack(get_state(source))
    data = packed.encode() if isinstance(packed, str) else json.dumps(packed.tolist()).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def reseed(held: Held, salts: Mapping[str, int], seed: int) -> None:
    """Seed each generator from where it is held, its salt and `seed`."""
    for path, source in held.items():
        mixed = repr((path, salts.get(path, 0), seed)).encode()
        _seed(source, int.from_bytes(hashlib.blake2b(mixed, digest_size=8).digest(), "little") >> 1)


def _seed(source: Any, seed: int) -> None:
    if isinstance(source, torch.Generator):
        source.manual_seed(seed)
    elif isinstance(source, random.Random):
        source.seed(seed)
    elif hasattr(source, "bit_generator"):
        source.bit_generator.state = type(source.bit_generator)(seed).state
    else:  # NumPy's RandomState takes 32 bits
        source.seed(seed % 2**32)
