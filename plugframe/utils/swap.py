"""Turning an object into itself plus hooks, and back, by swapping the class of that one instance.

PyTorch's own ``fully_shard`` does the same: `isinstance` holds, attributes, properties and methods are the
user's, and nothing wraps anything.
"""

from __future__ import annotations

import abc
import copy
import copyreg
from collections.abc import Iterator
from typing import Any

#: Where an adopted object keeps its state, in its own ``__dict__``.
KEY = "_plugframe"
#: Where an adopted class keeps the user's class.
_PLAIN = "_plugframe_plain"


class State:
    """What an adopted object knows. It belongs to that one object: in a copy there is None in its place."""

    def plain_dict(self, obj: Any) -> dict[str, Any]:
        """Return the attributes of the plain object."""
        return {key: value for key, value in obj.__dict__.items() if key != KEY}

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def adopt(obj: Any, state: Any, namespace: dict[str, Any]) -> None:
    """Give `obj` a subclass of its own class with `namespace` in it.

    A subclass of that one class has its layout, which is what lets Python swap the two. What is in `namespace`
    must work without a state too, as the plain class does: another class may have been put on top of ours, by
    a parametrization for instance, and stays when the object is given back.
    """
    original = type(obj)
    about = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        _PLAIN: original,
    }
    copying: dict[str, Any] = {"__reduce_ex__": _reduce_ex}
    # Only where the class copies in its own way: Python's own copying goes through __reduce_ex__.
    copying.update({n: f for n, f in (("__deepcopy__", _deepcopy), ("__copy__", _copy)) if hasattr(original, n)})
    object.__setattr__(obj, "__class__", _subclass(original, {**about, **copying, **namespace}))
    obj.__dict__[KEY] = state


def _subclass(original: Any, namespace: dict[str, Any]) -> type:
    """Return a subclass, unseen by what the user's classes do when they are subclassed (fill a registry)."""
    metaclass: Any = type(original)
    maker: Any = abc.ABCMeta if issubclass(metaclass, abc.ABCMeta) else type
    # Only creating a class calls __init_subclass__ of its base, giving it another base does not.
    base = next(klass for klass in original.__mro__ if _is_quiet(klass))
    if base is original:
        return maker.__new__(metaclass, original.__name__, (original,), namespace)  # type: ignore[no-any-return]
    try:
        adopted = maker.__new__(metaclass, original.__name__, (base,), dict(namespace))
        adopted.__bases__ = (original,)
    except TypeError:  # their layouts differ
        return metaclass(original.__name__, (original,), namespace)  # type: ignore[no-any-return]
    return adopted  # type: ignore[no-any-return]


def _is_quiet(klass: type) -> bool:
    function = getattr(klass.__init_subclass__, "__func__", None)  # none: it is object's
    return function is None or function.__module__ == "typing"


def release(obj: Any) -> Any:
    """Give `obj` its own class back and return its state."""
    state = obj.__dict__.pop(KEY)
    if _PLAIN in vars(type(obj)):
        object.__setattr__(obj, "__class__", plain_class(obj))
    return state


def state_of(obj: Any) -> Any:
    """Return the state of an adopted object, None for any other."""
    return getattr(obj, "__dict__", {}).get(KEY)


def plain_class(obj: Any) -> Any:
    """Return the user's class of an object that is or was adopted, its own class for any other."""
    return getattr(type(obj), _PLAIN, type(obj))


def plain(obj: Any) -> Any:
    """Return an object of the original class that shares all attributes with `obj` but the state."""
    cls = plain_class(obj) if _PLAIN in vars(type(obj)) else type(obj)
    twin = object.__new__(cls)
    twin.__dict__.update(obj.__dict__[KEY].plain_dict(obj))
    for slot in _slots(cls):
        try:
            slot.__set__(twin, slot.__get__(obj))
        except AttributeError:  # it was never set
            continue
    return twin


def _slots(cls: type) -> Iterator[Any]:
    for klass in cls.__mro__:
        names = vars(klass).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            private = name.startswith("__") and not name.endswith("__")
            slot = vars(klass).get(f"_{klass.__name__.lstrip('_')}{name}" if private else name)
            if hasattr(slot, "__set__") and name not in ("__dict__", "__weakref__"):
                yield slot


def _new(cls: type, *args: Any) -> Any:
    return cls.__new__(cls, *args)


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickle and copy as the plain object."""
    if state_of(self) is None:
        return plain_class(self).__reduce_ex__(self, protocol)
    reduced = plain(self).__reduce_ex__(protocol)
    if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
        # The pickler insists that this function makes an object of this very class. The one of older pickles makes
        # a plain one, also where plugframe is not installed.
        cls, *arguments = reduced[1]
        if not arguments and cls.__new__ is object.__new__:
            return (copyreg._reconstructor, (cls, object, None), *reduced[2:])  # type: ignore[attr-defined]
        return (_new, *reduced[1:])
    return reduced


def _deepcopy(self: Any, memo: dict[Any, Any]) -> Any:
    if state_of(self) is None:
        return plain_class(self).__deepcopy__(self, memo)
    # One twin for each copying: an object that refers to itself finds the copy that is being made.
    twin = memo.setdefault((KEY, id(self)), plain(self))
    return copy.deepcopy(twin, memo)


def _copy(self: Any) -> Any:
    if state_of(self) is None:
        return plain_class(self).__copy__(self)
    return copy.copy(plain(self))
