"""Turning an object into itself plus hooks, and back, by swapping the class of that one instance.

PyTorch's own ``fully_shard`` does the same: `isinstance` holds, attributes, properties and methods are the
user's, and nothing wraps anything.
"""

from __future__ import annotations

import copy
import copyreg
from typing import Any

#: Where an adopted object keeps its state, in its own ``__dict__``.
KEY = "_plugframe"


def adopt(obj: Any, state: Any, namespace: dict[str, Any]) -> None:
    """Give `obj` a subclass of its own class with `namespace` in it; ``state.original`` remembers the class.

    A subclass of that one class has its layout, which is what lets Python swap the two.
    """
    original = type(obj)
    state.original = original
    about = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    copying: dict[str, Any] = {"__reduce_ex__": _reduce_ex}
    # Only where the class copies in its own way: Python's own copying goes through __reduce_ex__.
    copying.update({n: f for n, f in (("__deepcopy__", _deepcopy), ("__copy__", _copy)) if hasattr(original, n)})
    metaclass: Any = type(original)
    adopted = metaclass(original.__name__, (original,), {**about, **copying, **namespace})
    object.__setattr__(obj, "__class__", adopted)
    obj.__dict__[KEY] = state


def _new(cls: type, *args: Any) -> Any:
    return cls.__new__(cls, *args)


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickle and copy as the plain object."""
    reduced = plain(self).__reduce_ex__(protocol)
    if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
        # The pickler insists that this function makes an object of this very class; ours makes a plain one.
        return (_new, *reduced[1:])
    return reduced


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    return copy.deepcopy(plain(self), memo)


def _copy(self: Any) -> Any:
    return copy.copy(plain(self))


def release(obj: Any) -> Any:
    """Give `obj` its own class back and return its state."""
    state = obj.__dict__.pop(KEY)
    object.__setattr__(obj, "__class__", state.original)
    return state


def state_of(obj: Any) -> Any:
    """Return the state of an adopted object, None for any other."""
    return getattr(obj, "__dict__", {}).get(KEY)


def plain(obj: Any) -> Any:
    """Return an object of the original class that shares all attributes with `obj` but the state."""
    state = obj.__dict__[KEY]
    twin = object.__new__(state.original)
    twin.__dict__.update(state.plain_dict(obj))
    return twin
