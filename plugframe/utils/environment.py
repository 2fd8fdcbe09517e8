"""Environment variables of this process, set for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables, unset those that are None, and put back what was there on leaving."""
    before = {name: os.environ.get(name) for name in variables}
    _put(variables)
    try:
        yield
    finally:
        _put(before)


@contextmanager
def preserved_environment() -> Iterator[None]:
    """Put back the complete environment on leaving, whatever was set, changed or unset in between."""
    before = dict(os.environ)
    try:
        yield
    finally:
        _put({name: before.get(name) for name in {*os.environ, *before} if os.environ.get(name) != before.get(name)})


def _put(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
