"""Models with ``save_pretrained``, as Hugging Face's libraries have them, and files in their layout."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from plugframe._compat import metadata
from plugframe.deferred.module import recording
from plugframe.errors import CheckpointError, SettingError, SettingTypeError
from plugframe.lite import checks
from plugframe.state.saving import checked_path

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite

_METHOD = "save_pretrained"
#: The entry-point group of functions that write weights, ``f(state, folder, limit_bytes)``, and the name of this one.
_GROUP, _LAYOUT = "plugframe_weights", "huggingface"
#: And of the context in which ``from_pretrained`` reads weights later, ``f(device)``.
_READING = "reading"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def running_methods(module: nn.Module) -> tuple[str, ...]:
    """Return methods besides ``forward`` that run a module's parts, where its source does not show it.

    ``generate`` of peft's models calls that of the model in them.
    """
    return ("generate",) if _is_of(module, "peft") and callable(getattr(type(module), "generate", None)) else ()


@contextmanager
def exact_buffers(module: nn.Module) -> Iterator[None]:
    """Keep the frequencies of rotary positions in float32 while a module is converted, as ``from_pretrained`` does.

    transformers computes angles in float32; rounded frequencies would be wrong by whole turns at late positions.
    """
    kept = [
        (part, name, buffer)
        for part in module.modules()
        if _is_of(part, "transformers")
        for name, buffer in part.named_buffers(recurse=False)
        if name.endswith("inv_freq") and name in part._non_persistent_buffers_set and buffer.dtype is torch.float32
    ]
    yield
    for part, name, buffer in kept:
        now = part._buffers[name]
        if now is not None and now.dtype.itemsize < buffer.dtype.itemsize:
            part._buffers[name] = buffer


def deferred_reading(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which ``from_pretrained`` leaves reading to set-up, where values are deferred."""
    if not recording():
        return nullcontext()
    (point,) = metadata.entry_points(group=_GROUP, name=_READING)
    context: AbstractContextManager[None] = point.load()(device)
    return context


def _is_of(module: nn.Module, package: str) -> bool:
    return any(cls.__module__.partition(".")[0] == package for cls in type(module).__mro__)


def connect(lite: Lite, module: nn.Module) -> None:
    """Make ``save_pretrained`` of a module work where ranks hold shards of it, until tear-down."""
    if "sharded" not in lite.plan.choices["strategy"].descriptor.provides or lite.world_size == 1:
        return
    method = getattr(type(module), _METHOD, None)
    if callable(method):
        setattr(type(module), _METHOD, _saving(lite, method))


def _saving(lite: Lite, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Save the full model, as a single process does. Every rank must call it; rank 0 writes."""
        state = full_state(lite, self)
        result, failure = None, None
        if lite.is_global_zero:
            try:
                with _given_state(self, state):
                    result = original(self, *args, **kwargs)
            except Exception as error:  # noqa: BLE001 the other ranks wait for the outcome
                failure = error
        _raise_everywhere(lite, failure, "save_pretrained()")
        return result

    return save_pretrained


def full_state(lite: Lite, module: nn.Module) -> dict[str, Any]:
    """Return the full state of a module on rank 0, with tied weights as one tensor. Every rank must call it."""
    state = lite.state_dict(module)
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name and known in state and name in state:
            state[name] = state[known]
    return state


@contextmanager
def _given_state(module: nn.Module, state: dict[str, Any]) -> Iterator[None]:
    """Let ``module.state_dict()`` return `state`: libraries that save a module call it."""
    vars(module)["state_dict"] = lambda *args, **kwargs: dict(state)
    try:
        yield
    finally:
        del vars(module)["state_dict"]


def save_model(lite: Lite, module: nn.Module, folder: Any, *, max_shard_size: int | str) -> None:
    """Write the full model in Hugging Face's layout; see `Lite.save_model`."""
    if not isinstance(module, nn.Module):
        raise SettingTypeError(f"save_model() takes a module first, got {type(module).__name__}.")
    lite._started("save_model")
    checks.check_set_up(module, "save_model", lite._hooks)
    target, limit = Path(checked_path(folder)), size_bytes(max_shard_size)
    if target.is_file():
        raise SettingError(f"save_model() writes a folder, and {str(target)!r} is a file.")
    state = full_state(lite, module)
    failure = None
    if lite.is_global_zero:
        try:
            target.mkdir(parents=True, exist_ok=True)
            if callable(getattr(type(module), _METHOD, None)) and _takes(module, "max_shard_size"):
                with _given_state(module, state):
                    # The plain method: rank 0 alone is here.
                    plain = inspect.unwrap(getattr(type(module), _METHOD))
                    plain(module, str(target), max_shard_size=limit)
            else:
                _write(state, target, limit)
        except Exception as error:  # noqa: BLE001 the other ranks wait for the outcome
            failure = error
    _raise_everywhere(lite, failure, "save_model()")


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(inspect.unwrap(getattr(type(module), _METHOD))).parameters


def _raise_everywhere(lite: Lite, failure: Exception | None, call: str) -> None:
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    found = lite.broadcast(text) if lite.world_size > 1 else text
    if failure is not None:
        raise failure
    if found is not None:
        raise CheckpointError(f"{call} failed on rank 0: {found}")


def size_bytes(size: Any) -> int:
    """Return a size given as a number of bytes, or as ``"5GB"``.

    Raises:
        SettingError: for anything else.
    """
    found = re.fullmatch(r"(\d+)\s*([KMG]I?B)", size.strip().upper()) if isinstance(size, str) else None
    number = int(found[1]) * _UNITS[found[2]] if found else size
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise SettingError(f"max_shard_size={size!r}: it is a number of bytes, or a size such as '5GB'.")
    return number


def _write(state: Mapping[str, Any], folder: Path, limit: int) -> None:
    """Write the weights by the function that is published for the layout."""
    (point,) = metadata.entry_points(group=_GROUP, name=_LAYOUT)
    point.load()(state, folder, limit)
