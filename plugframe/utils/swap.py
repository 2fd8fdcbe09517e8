"""Add hooks to one object by swapping its class, and remove them again.

PyTorch's ``fully_shard`` does the same: `isinstance` holds, attributes, properties and methods are the
user's, and there is no wrapper.
"""

from __future__ import annotations

import abc
import copy
import copyreg
from collections.abc import Iterator
from typing import Any

#: Key of an adopted object's state in its ``__dict__``.
KEY = "_plugframe"
#: Attribute of an adopted class that holds the user's class.
_PLAIN = "_plugframe_plain"


class State:
    """State of one adopted object; copies of the object hold None instead."""

    def plain_dict(self, obj: Any) -> dict[str, Any]:
        """Return the attributes of the plain object."""
        return {key: value for key, value in obj.__dict__.items() if key != KEY}

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def adopt(obj: Any, state: Any, namespace: dict[str, Any]) -> None:
    """Change the class of `obj` to a new subclass of it, with `namespace` as attributes.

    A direct subclass has the same layout, which Python requires for swapping. Functions in `namespace` must also work
    without a state, like those of the plain class: another class may have been derived from the adopted one, such as
    by a parametrization, and remains after `release`.
    """
    original = type(obj)
    metadata = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        _PLAIN: original,
    }
    copying: dict[str, Any] = {"__reduce_ex__": _reduce_ex}
    # Only if the class defines its own copying: Python's default uses __reduce_ex__.
    copying.update({n: f for n, f in (("__deepcopy__", _deepcopy), ("__copy__", _copy)) if hasattr(original, n)})
    object.__setattr__(obj, "__class__", _subclass(original, {**metadata, **copying, **namespace}))
    obj.__dict__[KEY] = state


def _subclass(original: Any, namespace: dict[str, Any]) -> type:
    """Return a subclass without calling ``__init_subclass__`` of the user's classes (which may fill a registry)."""
    metaclass: Any = type(original)
    maker: Any = abc.ABCMeta if issubclass(metaclass, abc.ABCMeta) else type
    # Creating a class calls __init_subclass__ of its base; changing its bases does not.
    base = next(klass for klass in original.__mro__ if _is_quiet(klass))
    if base is original:
        return maker.__new__(metaclass, original.__name__, (original,), namespace)  # type: ignore[no-any-return]
    try:
        adopted = maker.__new__(metaclass, original.__name__, (base,), dict(namespace))
        adopted.__bases__ = (original,)
    except TypeError:  # incompatible layouts
        return metaclass(original.__name__, (original,), namespace)  # type: ignore[no-any-return]
    return adopted  # type: ignore[no-any-return]


def _is_quiet(klass: type) -> bool:
    function = getattr(klass.__init_subclass__, "__func__", None)  # None for object's
    return function is None or function.__module__ == "typing"


def release(obj: Any) -> Any:
    """Restore the class of `obj` and return its state."""
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
    """Return an object of the original class that shares all attributes with `obj` except the state."""
    cls = plain_class(obj) if _PLAIN in vars(type(obj)) else type(obj)
    plain_obj = object.__new__(cls)
    plain_obj.__dict__.update(obj.__dict__[KEY].plain_dict(obj))
    for slot in _slots(cls):
        try:
            slot.__set__(plain_obj, slot.__get__(obj))
        except AttributeError:  # unset
            continue
    return plain_obj


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
        # The pickler requires that __newobj__ creates an object of this class. The older _reconstructor creates a plain
        # object, also where plugframe is not installed.
        cls, *arguments = reduced[1]
        if not arguments and cls.__new__ is object.__new__:
            return (copyreg._reconstructor, (cls, object, None), *reduced[2:])  # type: ignore[attr-defined]
        return (_new, *reduced[1:])
    return reduced


def _deepcopy(self: Any, memo: dict[Any, Any]) -> Any:
    if state_of(self) is None:
        return plain_class(self).__deepcopy__(self, memo)
    # Memoize the plain object, so that an object that refers to itself finds its copy.
    plain_obj = memo.setdefault((KEY, id(self)), plain(self))
    return copy.deepcopy(plain_obj, memo)


def _copy(self: Any) -> Any:
    if state_of(self) is None:
        return plain_class(self).__copy__(self)
    return copy.copy(plain(self))
