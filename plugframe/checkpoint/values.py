"""Plain values in JSON, dtypes by name, and numpy's values as plain ones and tensors."""

from __future__ import annotations

import base64
import math
import sys
from typing import Any

import torch
from torch import Tensor

#: A larger integer is no value of a run: Python takes minutes to write it out.
MAX_INT_BITS = 2**20


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: Any) -> torch.dtype:
    """Return the dtype of that name; a ValueError for anything else, whatever ``torch`` has under it."""
    dtype = vars(torch).get(name) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return dtype


def encode_scalar(value: str | int | float | complex | bytes) -> Any:
    """Return the JSON of a plain value: itself, or an object that tags what JSON cannot say exactly."""
    # The unbound methods: a subclass (an IntEnum, a str with its own __str__) may say something else.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__int__(value)
        # int() refuses decimal text of more than 4300 digits, hexadecimal never.
        return number if -(2**63) <= number < 2**64 else {"int": hex(number)}
    if isinstance(value, float):
        real = float.__float__(value)
        return real if math.isfinite(real) else {"float": repr(real)}
    if isinstance(value, complex):
        return {"complex": [encode_scalar(value.real), encode_scalar(value.imag)]}
    return {"bytes": base64.b64encode(value).decode("ascii")}


def large_int(text: Any) -> int:
    """Return the integer of a hexadecimal text; a ValueError for one beyond `MAX_INT_BITS`."""
    if not isinstance(text, str) or len(text) > MAX_INT_BITS // 4 + 3:
        raise ValueError("an integer is longer than any that is saved")
    return int(text, 16)


def special_float(text: Any) -> float:
    """Return the float JSON has no word for."""
    if text not in ("nan", "inf", "-inf"):
        raise ValueError(f"{text!r} is not nan, inf or -inf")
    return float(text)


def is_numpy(value: Any, kind: str) -> bool:
    """Say whether `value` is an instance of ``numpy.<kind>``."""
    # numpy is optional: who has an array has imported it.
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, getattr(numpy, kind))


def from_numpy(array: Any) -> Tensor | None:
    """Return the tensor of an array, on its memory where that can be, or None if no tensor holds such values."""
    numpy = sys.modules["numpy"]
    if type(array) not in (numpy.ndarray, numpy.memmap):
        return None
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except TypeError:
        return None
