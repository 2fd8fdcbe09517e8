"""Sharded parameters that behave as the full tensors outside of the model.

While the model runs, its parameters are gathered and plain. Otherwise they are ``DTensor``, and a
``DTensor`` does not mix with plain tensors, draws random numbers per shard, and pickles its
shard. `ShardedTensor` is a ``DTensor`` without these three restrictions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication

from plugframe.errors import UsageError
from plugframe_builtins._shared.sharding.gradient_hooks import add_hook, add_post_hook


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


#: Functions that read or set metadata: they gather no values.
_NEUTRAL = _names(
    "size dim ndimension numel nelement stride is_contiguous element_size storage_offset is_floating_point is_complex "
    "requires_grad_ detach detach_ retain_grad backward __hash__ __len__ __dir__ type get_device data_ptr is_shared "
    "untyped_storage storage _is_view is_pinned is_inference is_signed is_set_to dim_order dense_dim sparse_dim "
    "_typed_storage __reduce_ex__ __deepcopy__ __repr__ __format__ is_same_size is_conj is_neg"
)
_IN_PLACE = _names(
    "__iadd__ __isub__ __imul__ __idiv__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__ "
    "__setitem__"
)
#: Functions that return a view, through which the tensor can be written.
_VIEWS = _names(
    "view view_as reshape reshape_as flatten ravel unflatten __getitem__ select narrow slice t transpose T mT permute "
    "movedim swapaxes swapdims unbind chunk split tensor_split hsplit vsplit dsplit diagonal squeeze unsqueeze expand "
    "expand_as unfold as_strided"
)
#: Products, computed from full tensors, so that they round as in one process.
_PRODUCTS = _names("matmul __matmul__ __rmatmul__ mm addmm bmm baddbmm einsum tensordot linear svd qr eigh inverse")
#: Sums, likewise for dtypes of low precision.
_SUMS = _names("norm vector_norm linalg_vector_norm linalg_norm sum mean std var")
_RANDOM = _names("normal_ uniform_ bernoulli_ random_ exponential_ cauchy_ log_normal_ geometric_")


def as_sharded(tensor: Any) -> Any:
    """Return the same ``DTensor`` as a `ShardedTensor`; anything else unchanged."""
    if type(tensor) is DTensor:
        # As torch does for lazy parameters: the layout is the same, so the object and all references stay valid.
        tensor.__class__ = ShardedTensor
    return tensor


def gathered(tensor: DTensor) -> Tensor:
    """Return the full tensor, plain. Every rank must call it.

    Gradients through the result are averaged over ranks, as in a forward.
    """
    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def local_shard(full: Tensor, like: DTensor) -> DTensor:
    """Return this rank's shard of `full`, sharded as `like` is, without communication: every rank has `full`."""
    full = full.detach().to(like.device, like.dtype).contiguous()
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


class GatheredView(Tensor):
    """A gathered copy in place of a view of a sharded tensor: readable, and raises on writes."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _in_place(func.__name__) and args and isinstance(args[0], GatheredView):
            raise UsageError(
                f"{func.__name__}() on a view of a sharded tensor would change a copy: a view across the shards of the "
                "ranks is gathered. Change the parameter itself under torch.no_grad(), as in weight[0] = 0 or "
                "weight.mul_(mask)."
            )
        plain = [_map(_plain, args), {key: _plain(value) for key, value in (kwargs or {}).items()}]
        return func(*plain[0], **plain[1])


def _plain(value: Any) -> Any:
    if isinstance(value, GatheredView):
        return value.as_subclass(Tensor)
    return _map(_plain, value) if type(value) in (list, tuple) else value


class ShardedTensor(DTensor):
    """A sharded parameter, gradient, or tensor computed from them."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__" or name in _NEUTRAL:
            with torch._C.DisableTorchFunctionSubclass():
                return as_sharded(func(*args, **kwargs))
        special = _special(func, name)
        if special is not None:
            return special(func, args, kwargs)
        return _run(func, name, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError(
            f"This tensor of shape {tuple(self.shape)} is sharded: a pickle on each rank would hold a shard, which "
            "nothing can load. Use lite.save(path, state), or torch.save(lite.state_dict(model), path): every rank "
            "calls lite.state_dict()."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy as the full, plain tensor. Every rank must call it."""
        if id(self) not in memo:
            with torch.no_grad():
                full: Tensor = self.full_tensor().clone()
            made = nn.Parameter(full, self.requires_grad) if isinstance(self, nn.Parameter) else full
            vars(made).update({key: value for key, value in vars(self).items() if not key.startswith("_")})
            memo[id(self)] = made
        return memo[id(self)]


def _run(func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = list(_tensors(args)) if not kwargs else list(_tensors((*args, *kwargs.values())))
    in_place = _in_place(name)
    mixed = any(not isinstance(tensor, DTensor) and tensor.dim() for tensor in tensors)
    graph = (
        not in_place
        and torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors if isinstance(tensor, DTensor))
    )
    if graph or _needs_full(name, tensors) or (mixed and not (in_place and _first_is_sharded(args))):
        return func(*_map(gathered_all, args), **{key: gathered_all(value) for key, value in kwargs.items()})
    with torch._C.DisableTorchFunctionSubclass():
        if mixed:
            args = _aligned(args)
            with implicit_replication():
                return func(*args, **kwargs)
        try:
            result = func(*args, **kwargs)
        except RuntimeError:
            if not in_place:
                raise
            # torch raises before changing anything if operands of an in-place call are sharded differently.
            return func(*_aligned(args), **kwargs)
    if in_place:
        return result
    if isinstance(result, DTensor) and any(placement.is_partial() for placement in result.placements):
        return result.full_tensor()  # a norm or a sum: partial until reduced
    return _map(as_sharded, result) if isinstance(result, (list, tuple)) else as_sharded(result)


def _needs_full(name: str, tensors: Sequence[Tensor]) -> bool:
    return name in _PRODUCTS or (name in _SUMS and any(tensor.dtype.itemsize < 4 for tensor in tensors))


def _in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE


def _view(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a view of this rank's shard where possible, else a read-only copy of the full tensor."""
    held = args[0]
    if not isinstance(held, DTensor) or (torch.is_grad_enabled() and held.requires_grad):
        return func(*_map(gathered_all, args), **kwargs)
    axes = zip(held.placements, held.device_mesh.shape, strict=True)
    if all(not p.is_shard() or not held.shape[p.dim] % size for p, size in axes):  # type: ignore[attr-defined]
        # torch raises for some views across shards, and returns copies for others.
        with suppress(RuntimeError), torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **kwargs)
            if isinstance(made, DTensor) and _shares_memory(made, held):
                return as_sharded(made)
    with torch.no_grad():
        made = func(held.full_tensor(), *args[1:], **kwargs)
    return _map(_as_view, made) if isinstance(made, (list, tuple)) else _as_view(made)


def _as_view(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(GatheredView)


def _shares_memory(made: DTensor, held: DTensor) -> bool:
    mine, other = (each._local_tensor.untyped_storage().data_ptr() for each in (made, held))
    return mine == other


def gathered_all(value: Any) -> Any:
    """Return `value`, or a list or tuple, with sharded tensors replaced by full ones."""
    if isinstance(value, DTensor):
        return gathered(value)
    return _map(gathered_all, value) if type(value) in (list, tuple) else value


def _map(fn: Callable[[Any], Any], values: Any) -> Any:
    kind = type(values)
    if kind not in (list, tuple):  # a named tuple of torch.return_types
        return values if not any(isinstance(value, DTensor) for value in values) else kind([fn(v) for v in values])
    return kind(fn(value) for value in values)


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (list, tuple):
            yield from _tensors(value)


def _aligned(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of an in-place call with plain tensors, equal on all ranks, sharded as the first is."""
    first = args[0]
    if isinstance(first, (list, tuple)):
        return (first, *(_divided_all(value, first) for value in args[1:]))
    return (first, *(_divided(value, first) for value in args[1:]))


def _divided_all(values: Any, first: Sequence[Any]) -> Any:
    if not isinstance(values, (list, tuple)) or len(values) != len(first):
        return values
    return [_divided(value, held) for value, held in zip(values, first, strict=True)]


def _divided(value: Any, held: Any) -> Any:
    if not isinstance(held, DTensor) or not isinstance(value, Tensor) or not value.dim():
        return value
    if isinstance(value, DTensor):
        if value.placements == held.placements and value.shape == held.shape:
            return value
        value = value.full_tensor()
    with torch.no_grad():
        full = value.detach().to(held.device).broadcast_to(held.shape).contiguous()
        return distribute_tensor(full, held.device_mesh, held.placements, src_data_rank=None)


def _first_is_sharded(args: Sequence[Any]) -> bool:
    first = args[0] if args else None
    if isinstance(first, (list, tuple)):
        first = first[0] if first else None
    return isinstance(first, DTensor)


# ------------------------------------------------------------------ special cases


def _special(func: Callable[..., Any], name: str) -> Callable[..., Any] | None:
    if name == "__set__":
        return _SETTERS.get(getattr(func.__self__, "__name__", ""))  # type: ignore[attr-defined]
    if name in _RANDOM:
        return _draw
    if getattr(func, "__module__", "") == "torch.nn.init":
        return _draw
    if name in _VIEWS:
        return _view
    return _METHODS.get(name)


@torch.no_grad()
def _set_items(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Write items of the full tensor, and keep this rank's shard."""
    held = args[0]
    if not isinstance(held, DTensor):
        func(*_map(gathered_all, args))
        return
    full = held.full_tensor().clone()
    full[gathered_all(args[1])] = gathered_all(args[2])
    with torch._C.DisableTorchFunctionSubclass():
        held.copy_(local_shard(full, held))


@torch.no_grad()
def _draw(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Draw the random numbers of the full tensor on every rank, as one process does, and keep this rank's shard."""
    held = args[0] if args else kwargs.pop("tensor")
    if not isinstance(held, DTensor):
        return func(*_map(gathered_all, args), **kwargs)
    full = held.full_tensor().clone()  # an initialisation may leave values as they are
    func(full, *args[1:], **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        held.copy_(local_shard(full, held))
    return held


def _set_data(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Write values into the storage that torch gathers: torch would not see a new tensor."""
    held, value = args
    if value.shape != held.shape:
        raise UsageError(
            f"The data of a sharded parameter of shape {tuple(held.shape)} cannot be replaced by one of shape "
            f"{tuple(value.shape)}: resize it before lite.setup()."
        )
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        held.copy_(value if isinstance(value, DTensor) else local_shard(value, held))


def _set_grad(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    held, value = args
    if isinstance(value, Tensor) and not isinstance(value, DTensor) and isinstance(held, DTensor):
        value = local_shard(value, held)
    with torch._C.DisableTorchFunctionSubclass():
        func(held, value)


def _register(add: Callable[..., Any], func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    both: tuple[Any, ...] = (*args, *kwargs.values())
    held, hook = both
    if not held.is_leaf or not isinstance(held, nn.Parameter):
        with torch._C.DisableTorchFunctionSubclass():
            return func(held, hook)
    return add(held, hook)


_SETTERS = {"data": _set_data, "grad": _set_grad}
_METHODS: dict[str, Callable[..., Any]] = {
    "__setitem__": _set_items,
    "register_hook": functools.partial(_register, add_hook),
    "register_post_accumulate_grad_hook": functools.partial(_register, add_post_hook),
}
