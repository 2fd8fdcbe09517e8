"""State trees for the tests of checkpoints: a strategy that draws them, and exact equality."""

from __future__ import annotations

import math
import struct
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins.safetensors_checkpoint.checkpoint import SafetensorsCheckpoint

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.complex128,
    torch.complex64,
    torch.complex32,
)


def bits(tensor: Tensor) -> bytes:
    """The elements' bytes in row-major order, whatever the strides and the device."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    # Copying complex32 itself warns that it is experimental.
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = tensor.cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())


def same(a: Any, b: Any) -> bool:
    """Whether two trees are the same to the last bit: types, order of keys, sign of zero, nan with nan."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, dict):
        return (
            list(a) == list(b)
            and all(same(*pair) for pair in zip(a, b, strict=True))
            and same([*a.values()], [*b.values()])
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    return bool(a == b)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """A tensor of any bit patterns, not-a-numbers included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def _strided(tensor: Tensor, how: str) -> Tensor:
    if how == "transposed":
        return tensor.transpose(0, -1) if tensor.dim() else tensor
    if how == "sliced":
        return tensor[::2] if tensor.dim() else tensor
    return tensor.unsqueeze(0).expand(2, *tensor.shape) if how == "expanded" else tensor


def tensors() -> st.SearchStrategy[Tensor]:
    plain = st.builds(
        random_tensor,
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
        st.integers(0, 2**31),
    )
    return st.builds(_strided, plain, st.sampled_from(["", "transposed", "sliced", "expanded"]))


def trees() -> st.SearchStrategy[dict[Any, Any]]:
    """States of everything that can be saved and comes back as the same type."""
    texts = st.text(st.characters(), max_size=6)
    leaves = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | texts
        | st.binary(max_size=6)
        | st.complex_numbers(allow_nan=True, allow_infinity=True)
        | st.sampled_from(DTYPES)
        | tensors()
    )
    keys = texts | st.integers() | st.sampled_from(["a", "b", "a.b", "a/b", "__metadata__", "__plugframe__.manifest"])
    nested = st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(keys, inner, max_size=3)
        ),
        max_leaves=8,
    )
    return st.dictionaries(keys, nested, max_size=4)


def plugin(*, rank: int = 0, world_size: int = 1, broadcast: Any = None) -> SafetensorsCheckpoint:
    """The built-in plugin, set up as if a job were running; `broadcast` stands for the other ranks."""
    hooks = SimpleNamespace(collective_broadcast_object=broadcast or (lambda obj, src, group: obj))
    checkpoint = SafetensorsCheckpoint()
    checkpoint.checkpoint_setup(
        Context(
            world=World(global_rank=rank, world_size=world_size),
            device=torch.device("cpu"),
            hooks=hooks,
            names={"checkpoint": "safetensors"},
        )
    )
    return checkpoint
