"""Objects as bytes between ranks: plain values as JSON, anything else as a pickle under the job's token.

Unpickling runs code that the bytes name. A connection between ranks may be anybody's who reaches its port, so a pickle
carries a message authentication code under the job's token (HMAC-SHA256, RFC 2104) and is not opened without it.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
import pickle
import secrets
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from plugframe.errors import CollectiveMismatchError
from plugframe.hooks.variables import TOKEN
from plugframe.utils.stores import fresh_prefix
from plugframe.utils.tensor_bytes import as_bytes

_PLAIN, _PICKLE = b"J", b"P"
#: Bytes of the length of the JSON part, and of the authentication code.
_LENGTH, _CODE = 8, 32


class _NotPlainError(Exception):
    """The object needs a pickle."""


def pack(obj: Any, token: bytes) -> bytes:
    """Return `obj` as bytes for `unpack`.

    Plain values travel as JSON and raw bytes: None, bool, int, float, str, bytes, tensors on the CPU, dtypes, and
    lists, tuples, sets and dicts of them. They come back equal and of the same types. Anything else, or an object
    that refers to one list or dict twice, is pickled.

    Raises:
        Exception: whatever pickling the object raises.
    """
    try:
        return _Encoder().encode(obj)
    except (_NotPlainError, RecursionError, ValueError):  # ValueError: an integer with too many digits for JSON
        data = pickle.dumps(obj)
        return b"".join((_PICKLE, hmac.digest(token, data, "sha256"), data))


def unpack(data: bytes, token: bytes) -> Any:
    """Return the object that `pack` was given.

    Raises:
        CollectiveMismatchError: if a pickle was made without the token, or the bytes are not `pack`'s.
    """
    kind, rest = data[:1], memoryview(data)[1:]
    if kind == _PICKLE:
        code, body = rest[:_CODE], rest[_CODE:]
        if not hmac.compare_digest(bytes(code), hmac.digest(token, body, "sha256")):
            raise CollectiveMismatchError(
                "An object arrived that no rank of this job has sent: its authentication code is wrong. Another "
                "process has connected to the ranks, or the ranks were started with different values of " + TOKEN + "."
            )
        return pickle.loads(body)
    try:
        if kind != _PLAIN:
            raise ValueError(f"kind {kind!r}")
        length = int.from_bytes(rest[:_LENGTH], "little")
        header, buffers = bytes(rest[_LENGTH : _LENGTH + length]), rest[_LENGTH + length :]
        return _decoded(json.loads(header), buffers)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, RecursionError) as error:
        raise CollectiveMismatchError(f"Bytes arrived that are no object of a rank of this job ({error}).") from error


class _Encoder:
    """Writes one object."""

    def __init__(self) -> None:
        self._buffers: list[Any] = []
        self._offset = 0
        self._seen: set[int] = set()

    def encode(self, obj: Any) -> bytes:
        header = json.dumps(self._encoded(obj), separators=(",", ":")).encode()
        return b"".join((_PLAIN, len(header).to_bytes(_LENGTH, "little"), header, *self._buffers))

    def _encoded(self, obj: Any) -> Any:
        kind = type(obj)
        if obj is None or kind in (bool, int, float, str):
            return obj
        if kind is bytes:
            return {"bytes": base64.b64encode(obj).decode()}
        if kind is torch.dtype:
            return {"dtype": str(obj).removeprefix("torch.")}
        if kind in (list, dict, set, Tensor):
            self._note(obj)
        if kind is list:
            return [self._encoded(item) for item in obj]
        if kind in _TAGS:
            return {_TAGS[kind]: [self._encoded(item) for item in obj]}
        if kind is dict:
            return {"dict": [[self._encoded(key), self._encoded(value)] for key, value in obj.items()]}
        if kind is Tensor:
            return self._tensor(obj)
        raise _NotPlainError

    def _note(self, obj: Any) -> None:
        # Of an object that is referred to twice, two copies would arrive; a cycle would never end.
        if id(obj) in self._seen:
            raise _NotPlainError
        self._seen.add(id(obj))

    def _tensor(self, tensor: Tensor) -> Any:
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.requires_grad or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            raise _NotPlainError
        data = as_bytes(tensor)
        place, self._offset = self._offset, self._offset + len(data)
        self._buffers.append(data)
        return {"tensor": [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), place, len(data)]}


_TAGS: Mapping[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset", torch.Size: "size"}
_MAKERS: Mapping[str, Callable[[list[Any]], Any]] = {name: kind for kind, name in _TAGS.items()}


def _decoded(value: Any, buffers: memoryview) -> Any:
    if isinstance(value, list):
        return [_decoded(item, buffers) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag in _MAKERS:
        return _MAKERS[tag]([_decoded(item, buffers) for item in content])
    if tag == "dict":
        return {_decoded(key, buffers): _decoded(item, buffers) for key, item in content}
    if tag == "bytes":
        return base64.b64decode(content)
    if tag == "dtype":
        return _dtype(content)
    if tag == "tensor":
        name, shape, place, size = content
        return _tensor_of(bytes(buffers[place : place + size]), _dtype(name), shape)
    raise ValueError(f"tag {tag!r}")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"dtype {name!r}")
    return found


def _tensor_of(data: bytes, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(shape)


def job_token(store: Any, rank: int) -> bytes:
    """Return the token that all ranks of a job share.

    A launcher puts one into the environment of the ranks it starts, and of several nodes whoever starts the launchers
    can (``PLUGFRAME_JOB_TOKEN``). Without, rank 0 makes one and gives it away through `store`: it then keeps out
    nobody who can read that store. A process group without a store, such as one made by hand, has no token at all.

    Args:
        store: of the process group, or None.
    """
    given = os.environ.get(TOKEN)
    if given:
        return given.encode()
    if store is None:
        return b""
    # Several jobs may meet at one store, in turn.
    key = fresh_prefix(store, "token", rank)
    if rank == 0:
        store.set(key, secrets.token_hex(32))
    return cast("bytes", store.get(key))
