"""Histories of tensors without values: the data structures of `plugframe.deferred.module`.

Every deferred storage has a `Record`; every operation that creates or changes one is an `Op` in the records it writes.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from plugframe.errors import UnsupportedError

#: Attribute of an untyped storage that holds its record, so that both have the same lifetime.
_ATTRIBUTE = "_plugframe_record"


class Record:
    """The history of one deferred storage.

    Attributes:
        device: the device of the storage in an eager build.
        writes: operations that created or changed it, in order.
        clock: number of the last operation that read or wrote it.
        registrations: the parameters and buffers on it: weak reference to the module, name, tensor version.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.writes: list[Op] = []
        self.clock = 0
        self.registrations: list[tuple[weakref.ref[nn.Module], str, int]] = []

    def register(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        self.registrations = [
            w for w in self.registrations if w[0]() is not None and (w[0]() is not module or w[1] != name)
        ]
        self.registrations.append((weakref.ref(module), name, tensor._version))

    def check(self) -> None:
        """Raise if the history is incomplete.

        Raises:
            UnsupportedError: if a parameter was changed in place while nothing was recorded; names it.
        """
        for _, name, tensor, version in self._registered():
            if tensor._version != version:
                raise UnsupportedError(
                    f"{name!r} was changed in place outside of lite.init_module(empty_init=True), and the change would "
                    "be lost: make it inside `with lite.init_module(empty_init=True):`, or after lite.setup()."
                )

    def refresh(self) -> None:
        for module, name, tensor, _ in list(self._registered()):
            self.register(module, name, tensor)

    def _registered(self) -> Iterator[tuple[nn.Module, str, Tensor, int]]:
        for reference, name, version in self.registrations:
            module = reference()
            tensor = None if module is None else own_tensors(module).get(name)
            if module is not None and tensor is not None and record_of(tensor) is self:
                yield module, name, tensor, version


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module by name, without those of submodules and without None."""
    parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    return {**dict(parameters), **dict(buffers)}


def record_of(tensor: Tensor) -> Record | None:
    """Return the record of the storage of `tensor`; None if it is not deferred."""
    # Not by `tensor.is_meta`, which reports an eager device while a module is built.
    if is_lazy(tensor) or tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return None
    record: Record | None = getattr(tensor.untyped_storage(), _ATTRIBUTE, None)
    return record


def attach(tensor: Tensor, device: torch.device) -> Record:
    """Attach a new record to the storage of a meta tensor, which makes it deferred."""
    record = Record(device)
    setattr(tensor.untyped_storage(), _ATTRIBUTE, record)
    return record


@dataclass(frozen=True)
class Geometry:
    """Layout of a tensor in its storage."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conjugate: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Geometry:
        if tensor.is_neg():
            raise UnsupportedError(
                "lite.init_module(empty_init=True) cannot record the imaginary part of a conjugate: use -tensor.imag "
                "instead of tensor.conj().imag."
            )
        size, stride = tuple(tensor.size()), tuple(tensor.stride())
        return cls(tensor.dtype, size, stride, int(tensor.storage_offset()), tensor.is_conj())

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        tensor = tensor.set_(storage, self.offset, self.size, self.stride)
        return tensor.conj() if self.conjugate else tensor

    def bare(self, device: torch.device | str) -> Tensor:
        """Return a tensor of this size and stride without values."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Ref:
    """A deferred argument of an operation."""

    geometry: Geometry
    record: Record | None
    #: Replaces `record` in an operation of that record itself: a reference cycle would outlive the tensor.
    own: weakref.ref[Record] | None = None

    def found(self) -> Record:
        record = self.record if self.own is None else self.own()
        assert record is not None
        return record


@dataclass(frozen=True)
class Real:
    """A real argument of an operation: a copy, or for a big tensor the tensor itself and its version."""

    tensor: Tensor
    version: int | None

    def verified(self) -> Tensor:
        if self.version is not None and self.tensor._version != self.version:
            raise UnsupportedError(
                f"A tensor of shape {tuple(self.tensor.shape)} that initialises a parameter inside "
                "lite.init_module(empty_init=True) was changed before lite.setup(): do not change it, or pass a clone."
            )
        return self.tensor


@dataclass(eq=False)
class Op:
    """A recorded operation with its arguments.

    Attributes:
        number: greater than those of all earlier operations on the same storages.
        generators: the generators it draws from, each with its state before the operation.
        outputs: new storages among its results: position, record, layout, size in bytes.
        covers: size in bytes of the one storage that it overwrites completely, or None.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    number: int
    generators: list[tuple[Generator, Tensor]]
    dtype: torch.dtype
    refs: list[Ref] = field(default_factory=list)
    outputs: list[tuple[int, weakref.ref[Record], Geometry, int]] = field(default_factory=list)
    covers: int | None = None


class Generator:
    """A random generator: the default one of a device, or the user's own."""

    def __init__(self, device: torch.device, own: torch.Generator | None = None) -> None:
        self._own = own
        module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
        # RNG functions of device types with a single generator take no device argument.
        self._get = _bound(module.get_rng_state, device)
        self._set = _bound(module.set_rng_state, device)

    def state(self) -> Tensor:
        return self._own.get_state() if self._own is not None else self._get()

    def restore(self, state: Tensor) -> None:
        if self._own is not None:
            self._own.set_state(state)
        else:
            self._set(state)


def _bound(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    takes = "device" in inspect.signature(function).parameters
    return (lambda *args: function(*args, device=device)) if takes else function


def map_nested(fn: Callable[[Any], Any], value: Any) -> Any:
    """Return nested arguments with `fn` applied to everything that is not a list, tuple or dict."""
    if isinstance(value, (list, tuple)):
        items = [map_nested(fn, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: map_nested(fn, item) for key, item in value.items()}
    return fn(value)


def flatten(value: Any) -> list[Any]:
    """Return the leaves of nested arguments, in the order of `map_nested`."""
    leaves: list[Any] = []
    map_nested(leaves.append, value)
    return leaves
