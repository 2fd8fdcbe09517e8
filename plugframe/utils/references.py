"""Replace an optimizer's references to parameters."""

from __future__ import annotations

import dataclasses
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence, MutableSet
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.errors import UnsupportedError
from plugframe.utils.own_packages import own_packages

#: Converts an entry of an optimizer's state for the replacement of its parameter: ``(entry, old, new)``.
Convert = Callable[[Any, Tensor, Tensor], Any]

_PLAIN = (str, bytes, bytearray, int, float, complex, bool, type(None), type, types.ModuleType, torch.dtype)


def repoint(optimizer: Optimizer, successors: Mapping[Any, Any], *, convert: Convert | None = None) -> None:
    """Replace parameters everywhere an optimizer refers to them, in place.

    Covers parameter groups (the lists stay the same objects, so that ``LBFGS._params`` follows), the keys of the
    state, attributes, nested containers and objects, weak references, closures of hooks, dictionaries by ``id()``,
    and inner optimizers (Lookahead, SAM).

    Args:
        successors: new parameters by old ones.
        convert: converts state entries of an old parameter for the new one; without it, entries are kept.

    Raises:
        UnsupportedError: if the optimizer holds a view of an old parameter, which cannot be replaced.
    """
    pairs = {id(old): (old, new) for old, new in successors.items() if new is not old}
    if pairs:
        _Walk(pairs, convert).walk(optimizer, type(optimizer).__name__)


class _Walk:
    def __init__(self, pairs: dict[int, tuple[Tensor, Tensor]], convert: Convert | None) -> None:
        self._pairs = pairs
        self._convert = convert
        self._storages = {_storage(old) for old, _ in pairs.values()} - {None}
        # Keeps visited objects alive, so that their ids are not reused.
        self._seen: dict[int, Any] = {}
        self._replaced: dict[int, Any] = {}

    def walk(self, value: Any, path: str) -> Any:
        """Return `value`, or its replacement if it is an old parameter or an immutable container of one."""
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if id(value) in self._seen:
            return self._replaced.get(id(value), value)
        self._seen[id(value)] = value
        replaced = self._container(value, path)
        if replaced is not value:
            self._replaced[id(value)] = replaced
        return replaced

    def _tensor(self, value: Tensor, path: str) -> Tensor:
        if id(value) in self._pairs:
            return self._pairs[id(value)][1]
        if self._storages and _storage(value) in self._storages:
            raise UnsupportedError(
                f"{path} is a view of a parameter that setup replaces, so it would no longer share the parameter's "
                "values: create the optimizer after lite.setup_module(model), and set it up with "
                "lite.setup_optimizers()."
            )
        return value

    def _container(self, value: Any, path: str) -> Any:
        if isinstance(value, MutableMapping):
            self._mapping(value, path)
        elif isinstance(value, MutableSequence):
            self._sequence(value, path)
        elif isinstance(value, MutableSet):
            for item in list(value):
                new = self.walk(item, path)
                if new is not item:
                    value.discard(item)
                    value.add(new)
        elif isinstance(value, frozenset | tuple):
            return self._immutable(value, path)
        elif isinstance(value, weakref.ref):
            target = value()
            return weakref.ref(self._pairs[id(target)][1]) if id(target) in self._pairs else value
        elif isinstance(value, types.FunctionType):
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                self._cell(cell, f"{path}.{name}")
        elif isinstance(value, types.MethodType):
            self.walk(value.__self__, path)
        elif isinstance(value, functools.partial):
            return self._partial(value, path)
        elif not isinstance(value, nn.Module) and not _is_own(value):
            # Parameters of modules are replaced elsewhere.
            self._object(value, path)
        return value

    def _sequence(self, value: MutableSequence[Any], path: str) -> None:
        for index, item in enumerate(value):
            new = self.walk(item, f"{path}[{index}]")
            if new is not item:
                value[index] = new

    def _mapping(self, value: MutableMapping[Any, Any], path: str) -> None:
        items = [(key, entry, self._key(key)) for key, entry in value.items()]
        keys_changed = any(new is not key for key, _, new in items)
        if keys_changed:  # keep the order, in place
            for key, _, _ in items:
                del value[key]
        for key, entry, new_key in items:
            label = key if isinstance(key, str | int) else type(key).__name__
            new = self.walk(entry, f"{path}[{label!r}]")
            if isinstance(key, Tensor) and new_key is not key and self._convert is not None:
                new = self._converted(new, key, new_key)
            if keys_changed or new is not entry:
                value[new_key] = new

    def _key(self, key: Any) -> Any:
        if isinstance(key, Tensor):
            return self._pairs[id(key)][1] if id(key) in self._pairs else key
        if isinstance(key, int) and key in self._pairs:  # {id(parameter): …}
            return id(self._pairs[key][1])
        return self._immutable(key, "") if isinstance(key, tuple) else key

    def _converted(self, entry: Any, old: Tensor, new: Tensor) -> Any:
        assert self._convert is not None
        if not isinstance(entry, MutableMapping):
            return self._convert(entry, old, new)
        for name in list(entry):
            entry[name] = self._convert(entry[name], old, new)
        return entry

    def _immutable(self, value: Any, path: str) -> Any:
        items = [self.walk(item, path) for item in value]
        if all(new is item for new, item in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    def _partial(self, value: functools.partial[Any], path: str) -> Any:
        function = self.walk(value.func, path)
        args = self.walk(value.args, path)
        kwargs = dict(value.keywords)
        self._mapping(kwargs, path)
        same = function is value.func and args is value.args and kwargs == value.keywords
        return value if same else functools.partial(function, *args, **kwargs)

    def _cell(self, cell: types.CellType, path: str) -> None:
        try:
            content = cell.cell_contents
        except ValueError:  # the variable is unassigned
            return
        new = self.walk(content, path)
        if new is not content:
            cell.cell_contents = new

    def _object(self, value: Any, path: str) -> None:
        for name, item in list(getattr(value, "__dict__", {}).items()):
            new = self.walk(item, f"{path}.{name}")
            if new is not item:
                value.__dict__[name] = new
        for name in _slots(type(value)):
            item = getattr(value, name, None)
            new = self.walk(item, f"{path}.{name}")
            if new is not item:
                object.__setattr__(value, name, new)


def _slots(cls: type) -> Iterable[str]:
    for klass in cls.__mro__:
        names = vars(klass).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            private = name.startswith("__") and not name.endswith("__")
            if name not in ("__dict__", "__weakref__"):
                yield f"_{klass.__name__.lstrip('_')}{name}" if private else name


def _is_own(value: Any) -> bool:
    """Return whether an object belongs to plugframe or Python itself, and cannot hold the optimizer's references."""
    if isinstance(value, Optimizer) or dataclasses.is_dataclass(value):
        return False
    package = type(value).__module__.partition(".")[0]
    return package == "builtins" or package in own_packages()


def _storage(tensor: Tensor) -> int | None:
    """Return the data pointer of a tensor's storage, None without one (meta, sparse, subclasses, empty)."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        return None
