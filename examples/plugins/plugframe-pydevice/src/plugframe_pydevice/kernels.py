"""Kernels: torch's own for views, the CPU's over the same memory for arithmetic."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils import _pytree as pytree

from plugframe_pydevice import backend

aten = torch.ops.aten

# These CPU kernels read no data: they create a view of a storage on any device.
_ON_CPU = DispatchKeySet(DispatchKey.CPU)
_STRUCTURE = ("as_strided", "view", "_reshape_alias", "unfold")
# Index tensors may be on the CPU, as on other accelerators.
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")


def host(tensor: Tensor) -> Tensor:
    """Return a CPU view of the memory of `tensor`, or `tensor` itself if it is on the CPU."""
    if tensor.device.type == "cpu":
        return tensor
    storage = tensor.untyped_storage()
    size_bytes = storage.nbytes()
    if size_bytes == 0:
        raw = torch.empty(0, dtype=torch.uint8)
    else:
        raw = torch.frombuffer((ctypes.c_uint8 * size_bytes).from_address(storage.data_ptr()), dtype=torch.uint8)
    result = torch.empty(0, dtype=tensor.dtype)
    return result.set_(raw.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def empty_strided(size: Sequence[int], stride: Sequence[int], *, dtype: torch.dtype, index: int) -> Tensor:
    """Allocate a tensor on the device `index`."""
    last = sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    items = 0 if 0 in size else last + 1
    raw = backend.memory.allocate(items * dtype.itemsize, index=index)
    typed = aten.view.dtype.redispatch(_ON_CPU, raw, dtype)
    result: Tensor = aten.as_strided.default.redispatch(_ON_CPU, typed, size, stride, 0)
    return result


def to_device(tensor: Tensor, *, index: int) -> Tensor:
    """Copy a CPU tensor to the device `index`, with the same strides."""
    # The elements of an expanded tensor share memory and cannot be written.
    stride = tensor.stride() if 0 not in tensor.stride() else torch.empty_like(tensor, device="meta").stride()
    result = empty_strided(tensor.size(), stride, dtype=tensor.dtype, index=index)
    host(result).copy_(tensor)
    return result


def over(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a view of the storage of the device tensor `tensor`, with size, strides, offset and dtype of `like`."""
    place = like.size(), like.stride(), like.storage_offset()
    if like.dtype == tensor.dtype:
        result: Tensor = aten.as_strided.default.redispatch(_ON_CPU, tensor, *place)
        return result
    result = empty_strided([0], [1], dtype=like.dtype, index=tensor.device.index)
    return _set_storage(result, tensor.untyped_storage(), int(like.storage_offset()), like.size(), like.stride())


# ---------------------------------------------------------------------- memory


def _empty(size: Sequence[int], *, memory_format: torch.memory_format | None = None, **options: Any) -> Tensor:
    like = torch.empty(size, device="meta", memory_format=memory_format or torch.contiguous_format)
    return _empty_strided(size, like.stride(), **options)


def _empty_strided(
    size: Sequence[int],
    stride: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> Tensor:
    if layout not in (None, torch.strided):
        raise RuntimeError(f"{backend.NAME} has dense tensors only, not {layout}.")
    if pin_memory:
        raise RuntimeError(f"Only memory of the CPU can be pinned, not that of {backend.NAME}.")
    index = backend.index_of(device)
    return empty_strided(size, stride, dtype=dtype or torch.get_default_dtype(), index=index)


def _resize(tensor: Tensor, size: Sequence[int], *, memory_format: torch.memory_format | None = None) -> Tensor:
    like = torch.empty(size, device="meta", memory_format=memory_format or torch.contiguous_format)
    if tuple(tensor.size()) == tuple(size):
        return tensor
    storage, offset = tensor.untyped_storage(), int(tensor.storage_offset())
    if storage.nbytes() < (offset + like.numel()) * tensor.dtype.itemsize:
        larger = _empty([offset + like.numel()], dtype=tensor.dtype, device=tensor.device)
        kept, bytes_kept = larger.untyped_storage(), storage.nbytes()
        ctypes.memmove(kept.data_ptr(), storage.data_ptr(), bytes_kept) if bytes_kept else None
        storage = kept
    return _set_storage(tensor, storage, offset, like.size(), like.stride())


def _set_storage(tensor: Tensor, storage: Any, offset: int, size: Sequence[int], stride: Sequence[int] = ()) -> Tensor:
    if len(stride) != len(size):
        stride = torch.empty(size, device="meta").stride()
    result: Tensor = aten.set_.source_Storage_storage_offset.redispatch(_ON_CPU, tensor, storage, offset, size, stride)
    return result


def _set_storage_only(tensor: Tensor, storage: Any) -> Tensor:
    return _set_storage(tensor, storage, 0, [storage.nbytes() // tensor.dtype.itemsize])


def _set_empty(tensor: Tensor) -> Tensor:
    nothing = empty_strided([0], [1], dtype=tensor.dtype, index=tensor.device.index)
    return _set_storage(tensor, nothing.untyped_storage(), 0, [0])


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    host(target).copy_(host(source))
    return target


def _copy_from_and_resize(source: Tensor, target: Tensor) -> Tensor:
    return _copy_from(source, target.resize_(source.size()))


def _record_stream(tensor: Tensor, stream: Any) -> None:
    """Do nothing: every call is synchronous."""


def _is_compatible(tensor: Tensor, other: Tensor) -> bool:
    """Let ``module.to(device)`` keep its parameter objects, as on built-in devices, because optimizers hold them."""
    return tensor.layout is other.layout is torch.strided


# ---------------------------------------------------------------------- arithmetic


def fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run any operator on CPU views of its arguments; results that alias them on the CPU alias them here."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    device = _device_of(op, leaves)
    given: dict[int, Tensor] = {}
    host_leaves = [_to_host(leaf, given) for leaf in leaves]
    host_args, host_kwargs = pytree.tree_unflatten(host_leaves, structure)
    resized = _replace_outputs(op, kwargs, host_kwargs)
    with _generator_of(op, device):
        results = op(*host_args, **host_kwargs)
    for out, computed in resized:
        _copy_from_and_resize(computed, out)
    written = _written(op, args, kwargs)
    if written:
        return written[0] if len(written) == 1 else tuple(written)
    return pytree.tree_map(lambda result: _to_result(result, given, device), results)


def _device_of(op: Any, leaves: Sequence[Any]) -> int:
    found = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == backend.NAME}
    others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type != backend.NAME]
    if op._schema.name not in _INDEXING:
        found |= {leaf.device for leaf in others if leaf.dim() > 0}
    if len(found) > 1:
        names = " and ".join(sorted(map(str, found)))
        raise RuntimeError(f"{op._schema.name}: expected all tensors to be on the same device, found {names}.")
    if found:
        index: int = next(iter(found)).index
        return index
    named = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    return backend.index_of(named[0] if named else None)


def _to_host(leaf: Any, given: dict[int, Tensor]) -> Any:
    if isinstance(leaf, Tensor):
        if leaf.device.type == backend.NAME:
            given[leaf.untyped_storage().data_ptr()] = leaf
        return host(leaf)
    if isinstance(leaf, torch.device) and leaf.type == backend.NAME:
        return torch.device("cpu")
    return leaf


def _replace_outputs(op: Any, kwargs: dict[str, Any], host_kwargs: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Replace each ``out`` tensor by an empty CPU tensor, because some operators resize it several times."""
    pairs = []
    for argument in op._schema.arguments:
        out = kwargs.get(argument.name) if argument.is_out else None
        if isinstance(out, Tensor):
            host_kwargs[argument.name] = torch.empty(0, dtype=out.dtype)
            pairs.append((out, host_kwargs[argument.name]))
    return pairs


def _written(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that the operator writes and returns, in order."""
    values = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=False)} | kwargs
    written = {
        frozenset(argument.alias_info.before_set): values[argument.name]
        for argument in op._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in values
    }
    returned = [result.alias_info for result in op._schema.returns]
    return [written[frozenset(alias.before_set)] for alias in returned if alias is not None and alias.is_write]


def _to_result(result: Any, given: dict[int, Tensor], device: int) -> Any:
    if not isinstance(result, Tensor):
        return result
    shared = given.get(result.untyped_storage().data_ptr()) if result.untyped_storage().nbytes() else None
    return to_device(result, index=device) if shared is None else over(shared, result)


@contextmanager
def _generator_of(op: Any, device: int) -> Iterator[None]:
    """Run a random operator with the device's generator state, and restore the CPU's."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        yield
        return
    cpu_state = torch.get_rng_state()
    torch.set_rng_state(backend.get_rng_state(device))
    try:
        yield
    finally:
        backend.set_rng_state(torch.get_rng_state(), device)
        torch.set_rng_state(cpu_state)


# ---------------------------------------------------------------------- registration


def _structural(op: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return op.redispatch(_ON_CPU, *args, **kwargs)

    return kernel


def register() -> list[Any]:
    """Register all kernels; they stay registered while the returned libraries are referenced."""
    library: Any = torch.library.Library
    everything = library("_", "IMPL")
    everything.fallback(fallback, "PrivateUse1")
    own = library("aten", "IMPL", "PrivateUse1")
    kernels = {
        **{name: _structural(getattr(aten, name).default) for name in _STRUCTURE},
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "resize_": _resize,
        "set_.source_Storage_storage_offset": _set_storage,
        "set_.source_Storage": _set_storage_only,
        "set_": _set_empty,
        "_copy_from": _copy_from,
        "_copy_from_and_resize": _copy_from_and_resize,
        "record_stream": _record_stream,
        "_has_compatible_shallow_copy_type": _is_compatible,
    }
    for name, kernel in kernels.items():
        own.impl(name, kernel)
    return [everything, own]
