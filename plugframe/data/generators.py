"""Find the random generators that a dataset, its transforms or a ``collate_fn`` hold, and seed them per rank."""

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

from plugframe.utils.own_packages import own_packages
from plugframe.utils.proxy import StandIn
from plugframe.utils.rng import get_state, is_generator, pack, seed_generator, set_state, unpack

#: Generators by path, such as ``"dataset.transforms.1.rng"``.
Generators = dict[str, Any]

#: Limits of the search: depth, items of a container (a longer list holds samples, not transforms), and objects.
_MAX_DEPTH, _MAX_ITEMS, _MAX_OBJECTS = 6, 64, 1000
_LEAVES = (str, bytes, int, float, bool, complex, type(None), type, ModuleType, BuiltinFunctionType, Tensor)
#: Packages whose objects hold no generator of the user's.
_FOREIGN = ("torch", "builtins", "typing", "threading", "multiprocessing")


def find_generators(*, module_level: bool = True, **owners: Any) -> Generators:
    """Return the generators of torch, Python and NumPy that `owners` hold, each once; not those of the process.

    Args:
        module_level: whether to include globals that functions of the owners use.
    """
    found: Generators = {}
    seen = _process_generators()
    queue = deque((name, owner, 0) for name, owner in owners.items())
    while queue and len(seen) < _MAX_OBJECTS:
        path, value, depth = queue.popleft()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen.add(id(value))
        if is_generator(value):
            found[path] = value
        elif depth < _MAX_DEPTH:
            children = _children(value, module_level)
            queue.extend((f"{path}.{name}" if name else path, child, depth + 1) for name, child in children)
    return found


def generator_attributes(*owners: Any) -> list[Any]:
    """Return the generators of torch, Python and NumPy that are attributes of `owners`, each once."""
    values = (value for owner in owners for value in getattr(owner, "__dict__", {}).values())
    return list({id(value): value for value in values if is_generator(value)}.values())


def _process_generators() -> set[int]:
    numpy = sys.modules.get("numpy.random")
    functions = [random.random, *([numpy.random] if numpy else [])]
    return {id(torch.default_generator), *(id(getattr(function, "__self__", None)) for function in functions)}


def _children(value: Any, module_level: bool) -> Iterator[tuple[str, Any]]:
    cls = type(value)  # not __class__, which a proxy takes from the user's object
    if issubclass(cls, StandIn):
        yield "", value._inner
    elif issubclass(cls, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif issubclass(cls, MethodType):
        yield "self", value.__self__
    elif issubclass(cls, FunctionType):
        yield from _closure_variables(value)
        yield from _globals_of(value) if module_level else ()
    elif cls.__module__.partition(".")[0] not in ("threading", "multiprocessing", "plugframe"):
        if issubclass(cls, (list, tuple, dict)) and len(value) <= _MAX_ITEMS:
            yield from ((str(k), v) for k, v in (value.items() if issubclass(cls, dict) else enumerate(value)))
        yield from _attributes(value).items()
        yield from _globals_of_methods(cls) if module_level else ()


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, including slots."""
    attributes: dict[str, Any] = dict(getattr(value, "__dict__", None) or {})
    for klass in type(value).__mro__:
        slots = klass.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if isinstance(name, str) and not name.startswith("__") and hasattr(value, name):
                attributes[name] = getattr(value, name)
    return attributes


def _closure_variables(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents


def _globals_of(function: FunctionType) -> list[tuple[str, Any]]:
    """Return the generators among the globals that a function uses."""
    used = ((name, function.__globals__.get(name)) for name in function.__code__.co_names)
    return [(name, value) for name, value in used if is_generator(value)]


def _globals_of_methods(cls: type) -> list[tuple[str, Any]]:
    """Return the generators among the globals that the methods of a class use."""
    found: list[tuple[str, Any]] = []
    for klass in cls.__mro__:
        package = klass.__module__.partition(".")[0]
        if package not in _FOREIGN and package not in own_packages():
            for name, method in vars(klass).items():
                if isinstance(method, FunctionType):
                    found += [(f"{name}.{key}", value) for key, value in _globals_of(method)]
    return found


def pack_states(generators: Generators) -> dict[str, Any]:
    """Return the states of generators, for a checkpoint."""
    return {path: pack(get_state(generator)) for path, generator in generators.items()}


def restore_states(generators: Generators, states: Mapping[str, Any]) -> None:
    """Restore states returned by `pack_states`."""
    for path in generators.keys() & states.keys():
        set_state(generators[path], unpack(states[path]))


def salts(generators: Generators) -> dict[str, int]:
    """Return a hash of each generator's state, so that generators seeded differently stay different after `reseed`."""
    return {path: _salt(generator) for path, generator in generators.items()}


def _salt(generator: Any) -> int:
    packed = pack(get_state(generator))
    data = packed.encode() if isinstance(packed, str) else json.dumps(packed.tolist()).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def reseed(generators: Generators, salts: Mapping[str, int], seed: int) -> None:
    """Seed each generator from its path, its salt and `seed`."""
    for path, generator in generators.items():
        mixed = repr((path, salts.get(path, 0), seed)).encode()
        seed_generator(generator, int.from_bytes(hashlib.blake2b(mixed, digest_size=8).digest(), "little") >> 1)
