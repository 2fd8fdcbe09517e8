"""What was done to tensors that have no values yet: the ground `plugframe.deferred.module` stands on.

Every deferred storage has a `Record`; every operation that made or changed one is an `Op` in the records it wrote.
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

#: The attribute of an untyped storage that holds its record: the record lives exactly as long as the storage.
_ATTRIBUTE = "_plugframe_record"


class Record:
    """The history of one deferred storage.

    Attributes:
        device: where an eager build would have put it.
        writes: operations that made or changed it, in order.
        clock: number of the last operation that touched it.
        witnesses: the registered tensors on it: a reference to the module, the name, the tensor's version.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.writes: list[Op] = []
        self.clock = 0
        self.witnesses: list[tuple[weakref.ref[nn.Module], str, int]] = []

    def witness(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        self.witnesses = [w for w in self.witnesses if w[0]() is not None and (w[0]() is not module or w[1] != name)]
        self.witnesses.append((weakref.ref(module), name, tensor._version))

    def check(self) -> None:
        """Refuse a history that is not the whole one.

        Raises:
            UnsupportedError: naming a parameter that was changed in place while nothing was recorded.
        """
        for _, name, tensor, version in self._witnessed():
            if tensor._version != version:
                raise UnsupportedError(
                    f"{name!r} was changed in place after it was built without values, and the change would be lost: "
                    "do it inside `with lite.init_module(empty_init=True):`, or after lite.setup()."
                )

    def refresh(self) -> None:
        for module, name, tensor, _ in list(self._witnessed()):
            self.witness(module, name, tensor)

    def _witnessed(self) -> Iterator[tuple[nn.Module, str, Tensor, int]]:
        for reference, name, version in self.witnesses:
            module = reference()
            tensor = None if module is None else own_tensors(module).get(name)
            if module is not None and tensor is not None and record_of(tensor) is self:
                yield module, name, tensor, version


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters and buffers, those that are None or another's left out."""
    parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    buffers = module.named_buffers(recurse=False, remove_duplicate=False)
    return {**dict(parameters), **dict(buffers)}


def record_of(tensor: Tensor) -> Record | None:
    """Return the record of the storage of `tensor`, if it is deferred."""
    # Not by `tensor.is_meta`: while a module is built, that says what an eager build would say.
    if is_lazy(tensor) or tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return None
    record: Record | None = getattr(tensor.untyped_storage(), _ATTRIBUTE, None)
    return record


def attach(tensor: Tensor, device: torch.device) -> Record:
    """Give the storage of a meta tensor a record: it becomes deferred."""
    record = Record(device)
    setattr(tensor.untyped_storage(), _ATTRIBUTE, record)
    return record


@dataclass(frozen=True)
class Geometry:
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conjugate: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Geometry:
        if tensor.is_neg():
            raise UnsupportedError(
                "The imaginary part of a conjugate cannot be noted inside lite.init_module(empty_init=True): take "
                "-tensor.imag instead of tensor.conj().imag."
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
    #: Instead of `record` where the operation lies in that record itself: a cycle would outlive the tensor.
    own: weakref.ref[Record] | None = None

    def found(self) -> Record:
        record = self.record if self.own is None else self.own()
        assert record is not None
        return record


@dataclass(frozen=True)
class Real:
    """A real argument of an operation: a copy, or the tensor itself and its version where it is big."""

    tensor: Tensor
    version: int | None

    def checked(self) -> Tensor:
        if self.version is not None and self.tensor._version != self.version:
            raise UnsupportedError(
                f"A tensor of shape {tuple(self.tensor.shape)} that a parameter was initialised from inside "
                "lite.init_module(empty_init=True) was changed before lite.setup(): leave it, or pass a clone of it."
            )
        return self.tensor


@dataclass(eq=False)
class Op:
    """One operation, as it was called.

    Attributes:
        number: greater than those of all earlier operations on the same storages.
        generators: of every generator it draws from: what to set it with, and its state before.
        outputs: new storages among its results: position, record, layout.
        covers: size in bytes of the one storage it writes, where it leaves nothing of what was in it.
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
        # Where a kind of device has a single generator, its functions take no device.
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
    """Return the arguments of an operation with `fn` called on whatever is no list, tuple or dict."""
    if isinstance(value, (list, tuple)):
        items = [map_nested(fn, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: map_nested(fn, item) for key, item in value.items()}
    return fn(value)


def flatten(value: Any) -> list[Any]:
    """Return the leaves `map_nested` would call its function on."""
    leaves: list[Any] = []
    map_nested(leaves.append, value)
    return leaves
