"""Select the entries of objects to save: ``save(path, state, filter={"model": f})``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from plugframe.errors import CheckpointError, CheckpointKeyError, SettingTypeError, article, closest, names_text

Filter = Callable[[str, Any], bool]


def check_filters(filters: Any, state: Mapping[str, Any]) -> None:
    """Validate filters before anything is collected; None is none.

    Raises:
        SettingTypeError: for what is no dict of functions.
        CheckpointKeyError: for a key that the state lacks.
    """
    if filters is None:
        return
    if not isinstance(filters, Mapping):
        raise SettingTypeError(f"filter is a dict such as {{'model': f(name, value)}}, got {type(filters).__name__}.")
    for key, keep in filters.items():
        if key not in state:
            hint = closest(str(key), map(str, state))
            raise CheckpointKeyError(f"filter names {key!r}, which is not in the state: {names_text(state)}.{hint}")
        if not callable(keep):
            raise SettingTypeError(f"filter[{key!r}] is a function f(name, value) -> bool, got {type(keep).__name__}.")


def apply_filters(tree: dict[str, Any], filters: Mapping[str, Filter]) -> None:
    """Remove the entries of a state tree that a filter does not select.

    Raises:
        CheckpointError: for a value that has no entries.
    """
    for key, keep in filters.items():
        value = tree[key]
        if not isinstance(value, Mapping):
            what = article(type(value).__name__)
            raise CheckpointError(f"filter names {key!r}, which is {what} and has no entries to select.")
        tree[key] = {name: each for name, each in value.items() if keep(name, each)}
