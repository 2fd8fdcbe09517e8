"""Files of weights that libraries open while a module is built without values: each rank reads its shards at set-up."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from plugframe.deferred.module import recording
from plugframe.deferred.source import Region, from_source
from plugframe.errors import UnsupportedError
from plugframe.utils.environment import environment

#: Who opens files by this name: safetensors, for those who import it later, and the loader of transformers.
_MODULES, _NAME = ("safetensors", "transformers.modeling_utils"), "safe_open"
#: Reads in the thread whose operations are recorded (transformers 5).
_NO_THREADS = {"HF_DEACTIVATE_ASYNC_LOAD": "1"}
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
#: Smaller tensors are read at once, as others of their size are made at once.
_MIN_NUMEL = 4096
#: Of the rows of a tensor, and of the values of a row, by which files are compared over ranks.
_NUM_ROWS, _NUM_VALUES = 16, 64


@contextmanager
def deferred_reading(device: torch.device) -> Iterator[None]:
    """Within the block ``from_pretrained`` reads large tensors of safetensors files when they are materialized.

    Without effect where nothing is recorded, or safetensors is not in use.
    """
    if not recording():
        yield
        return
    import safetensors

    with ExitStack() as stack:
        stack.enter_context(environment(_NO_THREADS))
        plain = safetensors.safe_open
        if not isinstance(plain, functools.partial):  # else of an outer block
            opened = functools.partial(_File, device, plain)
            for name in _MODULES:
                if name in sys.modules:
                    setattr(sys.modules[name], _NAME, opened)
            stack.callback(_restore, opened, plain)
        yield


def _restore(opened: Any, plain: Any) -> None:
    """Put the function back, also into a module that was imported meanwhile."""
    for module in list(sys.modules.values()):
        if module is not None and vars(module).get(_NAME) is opened:
            setattr(module, _NAME, plain)


class _File:
    """An open file whose slices become deferred tensors."""

    def __init__(self, target: torch.device, plain: Any, /, *args: Any, **kwargs: Any) -> None:
        self._target, self._plain = target, plain
        self._path = os.fspath(args[0] if args else kwargs["filename"])
        self._file = plain(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *args: Any) -> Any:
        return self._file.__exit__(*args)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._file.get_slice(name), _Stored(self._plain, self._path, name), self._target)


class _Slice:
    """A tensor of a file; all of it is read later."""

    def __init__(self, inner: Any, stored: _Stored, device: torch.device) -> None:
        self._inner, self._stored, self._device = inner, stored, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __getitem__(self, index: Any) -> Tensor:
        shape, dtype = tuple(self._inner.get_shape()), _DTYPES.get(str(self._inner.get_dtype()))
        numel = functools.reduce(lambda a, b: a * b, shape, 1)
        if index is not Ellipsis or dtype is None or numel < _MIN_NUMEL or not recording():
            value: Tensor = self._inner[index]
            return value
        return from_source(self._stored, shape, dtype, self._device)


class _Stored:
    """Reads a tensor of a file, which must not change until then."""

    def __init__(self, plain: Any, path: str, name: str) -> None:
        self._open = functools.partial(plain, path, framework="pt", device="cpu")
        self._path, self._name = path, name
        self._state = self._now()

    def _now(self) -> tuple[int, int]:
        status = os.stat(self._path)
        return status.st_size, status.st_mtime_ns

    def read(self, region: Region | None) -> Tensor:
        """Return values of the tensor.

        Raises:
            UnsupportedError: if the file was changed meanwhile, or is gone.
        """
        if not os.path.isfile(self._path) or self._now() != self._state:
            raise UnsupportedError(
                f"{self._path!r} was changed after from_pretrained(), and its weights are read in lite.setup(): leave "
                "the file as it is until then, or use lite.init_module(empty_init=False)."
            )
        with self._open() as file:
            stored = file.get_slice(self._name)
            # A copy: the tensor may be a map of the file.
            value: Tensor = stored[...] if region is None else stored[region]
            return value.clone()

    def digest(self) -> str:
        """Return a checksum of the tensor's place, shape and a sample of its values."""
        found = hashlib.sha256()
        with self._open() as file:
            stored = file.get_slice(self._name)
            shape = stored.get_shape()
            found.update(repr((self._name, shape, stored.get_dtype())).encode())
            rows = shape[0] if shape else 0
            for number in range(_NUM_ROWS):
                row = rows * number // _NUM_ROWS
                rest = [slice(0, min(size, _NUM_VALUES)) for size in shape[1:]]
                region = (slice(row, row + 1), *rest)
                values = stored[region]
                found.update(values.contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:12]
