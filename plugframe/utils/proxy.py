"""Objects that stand in for one of the user's own, and pass for it."""

from __future__ import annotations

from typing import Any


class StandIn:
    """Stands in for an object of the user's own: whatever it does not do itself, that object does."""

    _inner: Any

    # What isinstance() goes by: a stand-in passes for the user's own.
    __class__ = property(lambda self: type(self._inner))  # pyright: ignore[reportIncompatibleMethodOverride]

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("_inner")
        if inner is None:  # while it is being unpickled
            raise AttributeError(name)
        return getattr(inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(type(self))["_own"]:
            object.__setattr__(self, name, value)
        else:
            setattr(self._inner, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the user's own."""
        return self._inner.__reduce_ex__(protocol)


def rebuilt(stand_in: StandIn) -> Any:
    """Return what ``__reduce_ex__`` of a stand-in gives that is pickled as itself: Python goes by its class."""
    return _rebuild, (type(stand_in), vars(stand_in))


def _rebuild(cls: type, values: dict[str, Any]) -> Any:
    made: Any = object.__new__(cls)
    vars(made).update(values)
    return made
