"""Convert plain values to JSON, dtypes to names, and NumPy values to plain values and tensors."""

from __future__ import annotations

import base64
import math
import sys
from typing import Any

import torch
from torch import Tensor

#: Larger integers are refused: Python takes minutes to format them.
MAX_INT_BITS = 2**20


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: Any) -> torch.dtype:
    """Return the dtype of that name.

    Raises:
        ValueError: if there is none.
    """
    dtype = vars(torch).get(name) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return dtype


def encode_scalar(value: str | int | float | complex | bytes) -> Any:
    """Return a plain value for JSON: itself, or a tagged object if JSON cannot represent it exactly."""
    # Unbound methods, since subclasses (an IntEnum, a str with its own __str__) may override them.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__int__(value)
        # int() refuses decimal strings of more than 4300 digits, but never hexadecimal ones.
        return number if -(2**63) <= number < 2**64 else {"int": hex(number)}
    if isinstance(value, float):
        real = float.__float__(value)
        return real if math.isfinite(real) else {"float": repr(real)}
    if isinstance(value, complex):
        return {"complex": [encode_scalar(value.real), encode_scalar(value.imag)]}
    return {"bytes": base64.b64encode(value).decode("ascii")}


def large_int(text: Any) -> int:
    """Return the integer of a hexadecimal string.

    Raises:
        ValueError: if it is longer than `MAX_INT_BITS`.
    """
    if not isinstance(text, str) or len(text) > MAX_INT_BITS // 4 + 3:
        raise ValueError(f"an integer has more than {MAX_INT_BITS} bits")
    return int(text, 16)


def special_float(text: Any) -> float:
    """Return a float that JSON cannot represent."""
    if text not in ("nan", "inf", "-inf"):
        raise ValueError(f"{text!r} is not nan, inf or -inf")
    return float(text)


def is_numpy(value: Any, kind: str) -> bool:
    """Return whether `value` is an instance of ``numpy.<kind>``."""
    # NumPy is optional: if an array exists, it is imported.
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, getattr(numpy, kind))


def from_numpy(array: Any) -> Tensor | None:
    """Return an array as a tensor, sharing memory if possible; None if no tensor dtype matches."""
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
