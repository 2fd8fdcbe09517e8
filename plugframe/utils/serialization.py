"""Serialize objects sent between ranks: plain values as JSON, others as a pickle signed with the job's token.

Unpickling executes code that the bytes name, and any process that reaches the port of a rank can connect. Pickles
therefore carry an HMAC-SHA256 code (RFC 2104) under the job's token, and are not loaded without it.
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
#: Size in bytes of the length of the JSON part, and of the authentication code.
_LENGTH, _CODE = 8, 32


class _NotPlainError(Exception):
    """Raised for an object that requires a pickle."""


def pack(obj: Any, token: bytes) -> bytes:
    """Serialize `obj` for `unpack`.

    Plain values are sent as JSON and raw bytes: None, bool, int, float, str, bytes, CPU tensors, dtypes, and lists,
    tuples, sets and dicts of them, with their types preserved. Other objects, and objects that refer to one list or
    dict twice, are pickled.

    Raises:
        Exception: any error of pickling the object.
    """
    try:
        return _Encoder().encode(obj)
    except (_NotPlainError, RecursionError, ValueError):  # ValueError: an integer with too many digits for JSON
        data = pickle.dumps(obj)
        return b"".join((_PICKLE, hmac.digest(token, data, "sha256"), data))


def unpack(data: bytes, token: bytes) -> Any:
    """Deserialize the output of `pack`.

    Raises:
        CollectiveMismatchError: if a pickle is not signed with the token, or the bytes are not from `pack`.
    """
    kind, rest = data[:1], memoryview(data)[1:]
    if kind == _PICKLE:
        code, body = rest[:_CODE], rest[_CODE:]
        if not hmac.compare_digest(bytes(code), hmac.digest(token, body, "sha256")):
            raise CollectiveMismatchError(
                "Received an object with a wrong authentication code, which no rank of this job has sent: another "
                "process has connected to the ranks, or they were started with different values of " + TOKEN + "."
            )
        return pickle.loads(body)
    try:
        if kind != _PLAIN:
            raise ValueError(f"kind {kind!r}")
        length = int.from_bytes(rest[:_LENGTH], "little")
        header, buffers = bytes(rest[_LENGTH : _LENGTH + length]), rest[_LENGTH + length :]
        return _decoded(json.loads(header), buffers)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, RecursionError) as error:
        raise CollectiveMismatchError(f"Received bytes that are no object of a rank of this job ({error}).") from error


class _Encoder:
    """Encodes one object as JSON with raw buffers."""

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
            self._check_unique(obj)
        if kind is list:
            return [self._encoded(item) for item in obj]
        if kind in _TAGS:
            return {_TAGS[kind]: [self._encoded(item) for item in obj]}
        if kind is dict:
            return {"dict": [[self._encoded(key), self._encoded(value)] for key, value in obj.items()]}
        if kind is Tensor:
            return self._tensor(obj)
        raise _NotPlainError

    def _check_unique(self, obj: Any) -> None:
        # JSON would duplicate an object that is referenced twice, and never end for a cycle.
        if id(obj) in self._seen:
            raise _NotPlainError
        self._seen.add(id(obj))

    def _tensor(self, tensor: Tensor) -> Any:
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.requires_grad or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            raise _NotPlainError
        data = as_bytes(tensor)
        offset, self._offset = self._offset, self._offset + len(data)
        self._buffers.append(data)
        return {"tensor": [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset, len(data)]}


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
        name, shape, offset, size = content
        return _tensor_of(bytes(buffers[offset : offset + size]), _dtype(name), shape)
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
    """Return the token shared by all ranks of a job.

    The launcher sets it in the environment of its ranks; for several nodes, the user can set it for all launchers
    (``PLUGFRAME_JOB_TOKEN``). Otherwise rank 0 creates one and shares it through `store`, which does not protect
    against processes that can read the store. Without a store (a manually created group) the token is empty.

    Args:
        store: store of the process group, or None.
    """
    given = os.environ.get(TOKEN)
    if given:
        return given.encode()
    if store is None:
        return b""
    # Several jobs may use one store in turn.
    key = fresh_prefix(store, "token", rank)
    if rank == 0:
        store.set(key, secrets.token_hex(32))
    return cast("bytes", store.get(key))
