"""Models with ``save_pretrained``, as Hugging Face's libraries have them, and files in their layout."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from plugframe.errors import CheckpointError, SettingError, SettingTypeError
from plugframe.lite import checks
from plugframe.state.saving import checked_path

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite

_METHOD = "save_pretrained"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def connect(lite: Lite, module: nn.Module) -> None:
    """Make ``save_pretrained`` and ``generate`` of a module work where ranks hold shards of it, until tear-down."""
    if "sharded" not in lite.plan.choices["strategy"].descriptor.provides or lite.world_size == 1:
        return
    method = getattr(type(module), _METHOD, None)
    if callable(method):
        setattr(type(module), _METHOD, _saving(lite, method))
    if callable(getattr(type(module), "generate", None)):
        # Read by transformers: ranks whose sequences have ended go on calling forward until all have.
        setattr(type(module), "_is_fsdp_managed_module", True)  # noqa: B010


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
                write(state, target, limit)
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


def write(state: Mapping[str, Any], folder: Path, limit: int) -> None:
    """Write tensors to ``model.safetensors``, or to several files of at most `limit` bytes and their index.

    A tensor under several names is written under the first. What is at the place of a file stays there until the new
    one is complete.

    Raises:
        CheckpointError: for a value that is no tensor.
    """
    from safetensors.torch import save_file

    files, total = _divided(state, limit)
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    for name, tensors in zip(names, files, strict=True):
        draft = folder / f".{name}.draft"
        save_file(tensors, draft, metadata={"format": "pt"})
        os.replace(draft, folder / name)
    index = folder / "model.safetensors.index.json"
    for old in folder.glob("model*.safetensors"):
        if old.name not in names and re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", old.name):
            old.unlink()
    if len(files) == 1:
        index.unlink(missing_ok=True)
        return
    places = {key: name for name, tensors in zip(names, files, strict=True) for key in tensors}
    draft = folder / f".{index.name}.draft"
    draft.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True))
    os.replace(draft, index)


def _divided(state: Mapping[str, Any], limit: int) -> tuple[list[dict[str, Tensor]], int]:
    """Return the tensors of each file, in order, and the size of all in bytes."""
    files: list[dict[str, Tensor]] = [{}]
    written: set[int] = set()
    size = total = 0
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name!r} of the model is a {type(tensor).__name__}: a file of weights holds tensors."
            )
        if id(tensor) in written:
            continue
        written.add(id(tensor))
        if files[-1] and size + tensor.nbytes > limit:
            files.append({})
            size = 0
        files[-1][name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    return files, total
