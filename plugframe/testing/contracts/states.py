"""Checkpoint states with every dtype, layout and plain value, and a comparison of two states."""

from __future__ import annotations

import math
import re
import struct
from typing import Any

import torch
from torch import Tensor

_NAME = re.compile(r"torch\.(?:u?int|b?float|complex)(\d+)\w*|torch\.bool")
_SHAPES = ((), (0,), (3, 5), (2, 0, 1))


def every_dtype() -> list[torch.dtype]:
    """Return every dtype with byte-sized elements: no quantized ones, no sub-byte ones."""
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    matches = {dtype: _NAME.fullmatch(str(dtype)) for dtype in found}
    whole = [d for d, match in matches.items() if match and int(match[1] or 8) == 8 * d.itemsize]
    return sorted(whole, key=str)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Return a tensor of random bits, NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def tensors() -> dict[str, Any]:
    """Return tensors of every dtype and layout: scalar, empty, strided, shared, with a gradient."""
    state: dict[str, Any] = {
        f"{dtype}{shape}": random_tensor(dtype, shape, seed=seed)
        for seed, dtype in enumerate(every_dtype())
        for shape in _SHAPES
    }
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    state["layouts"] = {
        "transposed": base.t(),
        "sliced": base[::2, 1::3],
        "expanded": base[:1].expand(4, 12),
        "part of a larger storage": base[2],
        "channels last": torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "conjugate": torch.arange(3).to(torch.complex64).mul(1j).conj(),
        "parameter": torch.nn.Parameter(base.clone()),
    }
    shared = torch.arange(10.0)
    state["shared"] = {"one": shared, "again": shared, "overlapping": shared[3:]}
    return state


def values() -> dict[Any, Any]:
    """Return all plain values of a state, nested, under keys that are easily confused."""
    numbers = [0, -1, 2**63, -(2**63) - 1, 10**400, True, False, None]
    floats = [0.0, -0.0, 0.1 + 0.2, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan]
    return {
        "numbers": numbers,
        "floats": tuple(floats),
        "texts": ["", "ü 漢 🙂", "a\nb\0c", '"{}[]\\', "tensor", "nan"],
        "nested": {"list": [[], (), {}, [({"deep": [1, (2.5, "x")]},)]], "tuple": (1, [2, (3,)])},
        "keys": {"": 1, "ü/漢": 2, "a.b": 3, "a": {"b": 4}, "a/b": 5, "dict": {"tensor": 6}, " ": 7, "__metadata__": 8},
        "numbered": {0: "int", "0": "str", -5: torch.tensor(5), 2**40: None},
        "": {"empty": {}, "none": None},
        "mixed": [torch.arange(3), {"w": torch.zeros(2, 2)}, "text", 1.5],
    }


def more_values() -> dict[str, Any]:
    """Return values that a format may store or refuse, but not change."""
    return {"bytes": b"\x00\xff\x80", "complex": complex(-0.0, math.inf), "dtype": torch.float32}


def small(number: int) -> dict[str, Any]:
    """Return a state like that of a small run, different for each `number`."""
    weight = random_tensor(torch.float32, (16, 9), seed=number).nan_to_num()
    return {
        "model": {"layer.weight": weight, "layer.bias": torch.full((16,), float(number))},
        "optimizer": {
            "state": {0: {"step": torch.tensor(float(number))}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 1.0)}],
        },
        "epoch": number,
        "best": -math.inf,
    }


def difference(saved: Any, loaded: Any, where: str = "state") -> str:
    """Describe where two trees differ; empty if they are equal bit for bit."""
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        return _tensors_differ(saved, loaded, where)
    if type(saved) is not type(loaded):
        return f"{where} was {_shown(saved)} and came back as {_shown(loaded)}"
    if isinstance(saved, dict):
        if set(map(_typed, saved)) != set(map(_typed, loaded)):
            return f"{where} had the keys {_shown(list(saved))} and came back with {_shown(list(loaded))}"
        pairs = [(saved[key], loaded[key], f"{where}[{key!r}]") for key in saved]
    elif isinstance(saved, (list, tuple)):
        if len(saved) != len(loaded):
            return f"{where} had {len(saved)} items and came back with {len(loaded)}"
        pairs = [(a, b, f"{where}[{number}]") for number, (a, b) in enumerate(zip(saved, loaded, strict=True))]
    else:
        return "" if _same(saved, loaded) else f"{where} was {_shown(saved)} and came back as {_shown(loaded)}"
    return next((text for text in (difference(*pair) for pair in pairs) if text), "")


def _tensors_differ(saved: Tensor, loaded: Tensor, where: str) -> str:
    if (saved.dtype, saved.shape) != (loaded.dtype, loaded.shape):
        was, now = (f"{t.dtype} of shape {tuple(t.shape)}" for t in (saved, loaded))
        return f"the tensor {where} was {was} and came back as {now}"
    if loaded.device.type != "cpu":
        return f"the tensor {where} came back on {loaded.device}, not on the CPU"
    if loaded.requires_grad:
        return f"the tensor {where} came back with requires_grad set"
    return "" if bits(saved) == bits(loaded) else f"the tensor {where} came back with other values"


def bits(tensor: Tensor) -> bytes:
    """Return the bytes of the elements in row-major order, whatever the strides."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu()
    # Copying half-precision complex numbers warns that they are experimental.
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = tensor.clone(memory_format=torch.contiguous_format).reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())


def _typed(key: Any) -> tuple[str, Any]:
    return type(key).__name__, key


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, complex):
        return _same(a.real, b.real) and _same(a.imag, b.imag)
    return bool(a == b)


def _shown(value: Any) -> str:
    text = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
    return text if len(text) <= 80 else f"{text[:77]}..."
