"""Artifacts, checked and in the form that loggers get."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plugframe.errors import SettingError
from plugframe.hooks.logger import Artifact
from plugframe.lite.hyperparams import is_number, plain_number

_PART = re.compile(r"[\w .\-+=()]+")
_ACCEPTED = "an image (a tensor, an array or a PIL image), a table (a list of dicts), text (a str) or a file (a Path)"
_CELLS = (str, int, float, bool, type(None))


def as_name(name: Any) -> str:
    """Return an artifact's name.

    Raises:
        SettingError: if it could not be a relative path.
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    if not all(_PART.fullmatch(part) and part.strip(" .") and part == part.strip() for part in parts):
        raise SettingError(
            f"log_artifact({name!r}): a name has letters, digits, spaces and .-_+=() in parts separated by '/'."
        )
    return str(name)


def as_artifact(name: str, value: Any) -> Artifact:
    """Return an artifact in the form that loggers get: see `plugframe.hooks.LoggerSpec.logger_log_artifact`.

    Raises:
        SettingError: if it is none.
    """
    if isinstance(value, str):
        return _text(name, value)
    if isinstance(value, os.PathLike):
        return _file(name, Path(value))
    if isinstance(value, (list, tuple)) and all(isinstance(row, Mapping) for row in value):
        return _table(value)
    image = value if isinstance(value, Tensor) else _from_array(value)
    if image is None:
        tables = ": write frame.to_dict('records')" if hasattr(value, "to_dict") else ""
        raise SettingError(f"log_artifact({name!r}) takes {_ACCEPTED}, got {type(value).__name__}{tables}.")
    return _image(name, image)


def _text(name: str, value: str) -> str:
    if "\n" not in value and len(value) < 1000 and "\0" not in value and os.path.isfile(value):
        raise SettingError(
            f"log_artifact({name!r}, {value!r}): there is a file {value!r}: write Path({value!r}) to log it, or add a "
            "line break to log the text."
        )
    return value


def _file(name: str, path: Path) -> Path:
    if path.is_dir():
        raise SettingError(f"log_artifact({name!r}): {str(path)!r} is a folder: log its files one by one.")
    if not path.is_file():
        raise SettingError(f"log_artifact({name!r}): there is no file {str(path)!r}.")
    return path.absolute()


def _table(rows: Sequence[Mapping[Any, Any]]) -> list[dict[str, Any]]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [{str(key): _cell(row.get(key)) for key in columns} for row in rows]


def _cell(value: Any) -> Any:
    if type(value) in _CELLS:
        return value
    return plain_number(value) if is_number(value) else str(value)


def _from_array(value: Any) -> Tensor | None:
    """Return an image of shape (H, W) or (H, W, C) as (C, H, W); None if it is no array."""
    if not (hasattr(value, "__array__") or hasattr(value, "__array_interface__")) or hasattr(value, "to_dict"):
        return None
    import numpy  # there, as the value is one of its arrays or of a package that needs it

    array = torch.from_numpy(numpy.array(value))
    return array.permute(2, 0, 1) if array.ndim == 3 else array


def _image(name: str, image: Tensor) -> Tensor:
    """Return an image as uint8 of shape (C, H, W) on the CPU."""
    shape, dtype = tuple(image.shape), image.dtype
    image = image.detach().cpu()
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4) or image.numel() == 0:
        raise SettingError(
            f"log_artifact({name!r}): an image has the shape (H, W), or (C, H, W) for a tensor and (H, W, C) for an "
            f"array, with 1, 3 or 4 channels C, got a {'x'.join(map(str, shape)) or 'number'}{' image' * bool(shape)}."
        )
    if dtype == torch.bool:
        return image.to(torch.uint8) * 255
    if dtype == torch.uint8:
        return image.clone(memory_format=torch.contiguous_format)
    if not dtype.is_floating_point:
        raise SettingError(f"log_artifact({name!r}): an image is uint8, bool or floating, got {dtype}.")
    image = image.double()
    low, high = image.min().item(), image.max().item()
    if not 0 <= low <= high <= 1:
        raise SettingError(
            f"log_artifact({name!r}): a floating image has values from 0 to 1, got {low:.4g} to {high:.4g}: scale it."
        )
    return (image * 255).round().to(torch.uint8)
