"""Run a module twice as if it ran once: what its first run changes is put back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from plugframe.base import map_tensors
from plugframe.errors import UnsupportedError

_CONTAINERS = (list, dict, set)


@contextmanager
def restored(module: nn.Module, leave: Collection[nn.Module]) -> Iterator[None]:
    """Restore buffers, attributes, and lists, dicts and sets among them on exit.

    Args:
        leave: submodules that do not run.
    """
    kept = {part: dict(vars(part)) for part in module.modules() if part not in leave}
    for part, attributes in kept.items():
        for name, value in attributes.items():
            if name == "_buffers":
                vars(part)[name] = {key: None if each is None else each.clone() for key, each in value.items()}
            elif type(value) in _CONTAINERS and not _is_torchs(name):
                vars(part)[name] = value.copy()
    try:
        yield
    finally:
        for part, attributes in kept.items():
            vars(part).clear()
            vars(part).update(attributes)


def _is_torchs(name: str) -> bool:
    return name in ("_parameters", "_modules", "_non_persistent_buffers_set") or name.endswith(("_hooks", "_kwargs"))


def copied(value: Any) -> Any:
    """Return an argument with copies of its lists and dicts, and the same tensors."""
    if type(value) is dict:
        return {key: copied(each) for key, each in value.items()}
    if type(value) is list or type(value) is tuple:
        return type(value)(copied(each) for each in value)
    return value


@contextmanager
def unchanged_arguments(arguments: Any, path: str) -> Iterator[None]:
    """Raise on exit if a tensor among the arguments was changed.

    Raises:
        UnsupportedError: with the path of the module.
    """
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(note, arguments)
    versions = [None if tensor.is_inference() else tensor._version for tensor in tensors]
    yield
    if any(
        version is not None and tensor._version != version for tensor, version in zip(tensors, versions, strict=True)
    ):
        raise UnsupportedError(
            f"The forward of {path!r} changes an argument in place, and strategy 'expert' runs it twice, first to see "
            "which tokens go to which experts: change a copy."
        )
