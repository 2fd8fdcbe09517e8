"""Transparent proxies for user objects."""

from __future__ import annotations

from typing import Any


class StandIn:
    """Base class of proxies: attributes it does not define are those of the wrapped object.

    Subclasses set ``_own``, the names of their own attributes.
    """

    _inner: Any

    # isinstance() uses this property: a proxy passes for an instance of the user's class.
    __class__ = property(lambda self: type(self._inner))  # pyright: ignore[reportIncompatibleMethodOverride]

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("_inner")
        if inner is None:  # during unpickling
            raise AttributeError(name)
        return getattr(inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(type(self))["_own"]:
            object.__setattr__(self, name, value)
        else:
            setattr(self._inner, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the wrapped object."""
        return self._inner.__reduce_ex__(protocol)


def rebuilt(proxy: StandIn) -> Any:
    """Return a ``__reduce_ex__`` value that pickles a proxy as itself: Python's default would use ``__class__``."""
    return _rebuild, (type(proxy), vars(proxy))


def _rebuild(cls: type, values: dict[str, Any]) -> Any:
    proxy: Any = object.__new__(cls)
    vars(proxy).update(values)
    return proxy
