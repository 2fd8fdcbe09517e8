"""Describe the modules in a state for checkpoint formats: class, configuration and tied weights."""

from __future__ import annotations

import dataclasses
import enum
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from plugframe.adopt.module import compiled_from
from plugframe.checkpoint.tree import MAX_DEPTH
from plugframe.state.key_matching import tied_names
from plugframe.utils.swap import plain_class

_PLAIN = (str, int, float, bool, type(None))


class _NotPlain(Exception):
    """A configuration holds something other than plain values."""


def module_infos(state: Any, tree: Any) -> dict[str, dict[str, Any]]:
    """Return what is known of each module in `state`, by its key in the state, nested keys joined by dots.

    Args:
        state: the user's objects.
        tree: their states; see `plugframe.state.tree.collect`.
    """
    return {key: _info(module, own) for key, module, own in _modules(state, tree, ())}


def _modules(value: Any, tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, nn.Module, Mapping[str, Any]]]:
    if isinstance(value, nn.Module):
        if isinstance(tree, Mapping):
            yield ".".join(path), value, tree
    elif len(path) > MAX_DEPTH:
        return
    elif isinstance(value, Mapping) and isinstance(tree, Mapping):
        for key, item in value.items():
            yield from _modules(item, tree.get(key), (*path, str(key)))
    elif isinstance(value, (list, tuple)) and isinstance(tree, (list, tuple)):
        for number, (item, own) in enumerate(zip(value, tree, strict=False)):
            yield from _modules(item, own, (*path, str(number)))


def _info(module: nn.Module, own: Mapping[str, Any]) -> dict[str, Any]:
    inner = compiled_from(module) or module
    return {
        "class": plain_class(inner).__name__,
        "config": _config(getattr(inner, "config", None)),
        "tied": tied_names(module, own),
    }


def _config(config: Any) -> dict[str, Any] | None:
    """Return a module's ``config`` as plain values; None if it has none, or one that holds anything else."""
    values: Any = None
    # The user's code may fail or return anything: then there is no configuration, and formats that need one say so.
    with suppress(Exception):
        if callable(getattr(config, "to_dict", None)):
            values = config.to_dict()
        elif dataclasses.is_dataclass(config) and not isinstance(config, type):
            values = dataclasses.asdict(config)
        elif isinstance(config, Namespace):
            values = vars(config)
        elif isinstance(config, Mapping):
            values = config
        plain = _plain(values, 0)
        return plain if isinstance(plain, dict) else None
    return None


def _plain(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH // 4:
        raise _NotPlain
    if isinstance(value, enum.Enum):
        return _plain(value.value, depth + 1)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Mapping):
        # Keys as in JSON, in which configurations are kept.
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    raise _NotPlain
