"""Tensors of other stages: they have a shape and no values, and computing with them gives more of them.

Every rank runs the user's own forward. Until it reaches the first module of its stage, it computes with a `StandIn` for
what earlier stages compute: torch's shape arithmetic on the meta device, at no cost. The received activation then
takes the place of the stand-in. Values that are still missing at the end are an error, never a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.base import map_tensors
from plugframe.errors import PlugframeError, UnsupportedError

#: Functions that act on the object itself, not on its values.
_OWN = frozenset(
    {
        "__get__",
        "__set__",
        "__hash__",
        "__len__",
        "requires_grad_",
        "register_hook",
        "register_post_accumulate_grad_hook",
        "retain_grad",
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "element_size",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "get_device",
    }
)


class OtherStage(Tensor):
    """Base of tensors without values; `origin` says what they would hold."""

    origin: str
    #: The device the values are on, which scripts read.
    home: torch.device

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _apply(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<{self.origin}>"

    def __format__(self, format_spec: str) -> str:
        return repr(self)

    def __deepcopy__(self, memo: Any) -> Any:
        raise UnsupportedError(
            f"{self.origin} cannot be copied: this rank does not have its values. Copy the model before lite.setup(), "
            "or load lite.state_dict(model, all_ranks=True) into another one."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(
            f"{self.origin} cannot be saved by this rank, which does not have its values: use lite.save(), or "
            "lite.state_dict(model), which gathers all stages."
        )


class StandIn(OtherStage):
    """The result of a computation that involves another stage's tensors.

    Attributes:
        value: what took its place, once the activation of the stage before was received.
    """

    value: Tensor | None


class Backwards:
    """Counts the backwards of a model: other stages' parameters have gradients after one."""

    count = 0


class OtherParameter(OtherStage, nn.Parameter):
    """A parameter of another stage: still the user's object, in the optimizers too, without storage.

    Attributes:
        backwards: those of its model.
        cleared: how many of them had run when the gradient was set to None.
    """

    backwards: Backwards
    cleared: int


def stand_in(like: Tensor, origin: str, home: torch.device) -> StandIn:
    """Return a stand-in of the shape and dtype of `like`."""
    meta = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
    made = meta.as_subclass(StandIn)
    made.origin, made.home, made.value = origin, home, None
    return made


@torch.no_grad()
def give_up(parameter: nn.Parameter, origin: str, backwards: Backwards) -> None:
    """Free the values of a parameter; the object stays, and computing with it gives stand-ins."""
    home = parameter.device
    parameter.grad = None
    parameter.data = parameter.data.new_empty((1,) * parameter.dim()).expand(parameter.shape)
    parameter.__class__ = OtherParameter
    other: Any = parameter
    other.origin, other.home, other.backwards, other.cleared = origin, home, backwards, 0


def is_missing(value: Any) -> bool:
    """Return whether a value is a tensor of another stage, for which nothing was received."""
    return isinstance(value, OtherStage) and getattr(value, "value", None) is None


def resolved(data: Any) -> Any:
    """Return `data` (any nesting) with received activations in place of their stand-ins."""
    return map_tensors(_resolve, data)


def tensors_of(data: Any) -> list[Tensor]:
    """Return the tensors in `data`, in order."""
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(add, data)
    return found


def first_missing(data: Any) -> OtherStage | None:
    """Return the first tensor of another stage in `data`, None if there is none."""
    return next((each for each in tensors_of(data) if is_missing(each)), None)  # type: ignore[return-value]


def _resolve(tensor: Tensor) -> Tensor:
    value: Tensor | None = getattr(tensor, "value", None) if isinstance(tensor, StandIn) else None
    return tensor if value is None else value


def _apply(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", str(func))
    with torch._C.DisableTorchFunctionSubclass():
        subject = args[0] if args else None
        if name in _OWN and isinstance(subject, OtherStage) and is_missing(subject):
            return _about(func, subject, args, kwargs)
        args, kwargs = resolved(args), resolved(kwargs)
        missing = first_missing((args, kwargs))
        if missing is None:
            return func(*args, **kwargs)
        if name in _MOVES:
            return _moved(func, args, kwargs)
        if name.startswith("_foreach_") and name.endswith("_"):
            return _one_by_one(func, missing, args, kwargs)
        if (_writes(name) and first_present(args[:1])) or first_present(kwargs.get("out")):
            raise UnsupportedError(_needs(name, missing))
        return _without_values(name, func, missing, args, kwargs)


def _about(func: Callable[..., Any], subject: OtherStage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Act on the object itself: read or set an attribute, add a hook."""
    if func == _DEVICE:
        return subject.home
    if func == _IS_META:
        return False
    if func == _SET_DATA:
        return None  # its own rank sets it
    if isinstance(subject, OtherParameter) and func == _GRAD:
        if not subject.requires_grad or subject.backwards.count <= subject.cleared:
            return None
        return stand_in(subject, f"the gradient of {subject.origin}", subject.home)
    if isinstance(subject, OtherParameter) and func == _SET_GRAD:
        subject.cleared = subject.backwards.count if args[1] is None else -1
        return None
    result = func(*args, **kwargs)
    if not isinstance(result, Tensor) or result is subject:
        return result
    return stand_in(result, subject.origin, subject.home)


_DEVICE: Any = Tensor.device.__get__
_IS_META: Any = Tensor.is_meta.__get__  # type: ignore[attr-defined]
_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]
_GRAD: Any = Tensor.grad.__get__  # type: ignore[union-attr]
_SET_GRAD: Any = Tensor.grad.__set__  # type: ignore[union-attr]
_MOVES = ("to", "cpu", "cuda", "xpu")


def first_present(data: Any) -> bool:
    """Return whether `data` has a tensor with values."""
    return any(not is_missing(tensor) for tensor in tensors_of(data))


def _writes(name: str) -> bool:
    """Return whether a function changes its first argument."""
    if name.startswith("__"):
        return name in ("__set__", "__setitem__") or (name[:3] == "__i" and name not in _READS)
    return name.endswith("_")


_READS = ("__index__", "__int__", "__invert__", "__init__", "__iter__")


def _needs(name: str, missing: OtherStage) -> str:
    return (
        f"{name}() needs values that this rank does not have: {missing.origin}. In a forward, pass what one stage "
        "computes to the next through the module that starts it; for norms use lite.clip_gradients(), and for values "
        "lite.state_dict(model), which gathers all stages."
    )


def _moved(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    subject = args[0]
    if not isinstance(subject, OtherStage):  # to(other): to the dtype and device of a tensor of another stage
        other = args[1]
        return subject.to(device=other.home, dtype=other.dtype)
    rest = [each for each in args[1:] if not isinstance(each, (torch.device, str))]
    others = [each for each in rest if isinstance(each, torch.dtype)]
    others += [each.dtype for each in rest if isinstance(each, Tensor)]
    dtype = kwargs.get("dtype") or next(iter(others), subject.dtype)
    like = torch.empty_strided(subject.shape, subject.stride(), dtype=dtype, device="meta")
    return subject if dtype == subject.dtype else stand_in(like, subject.origin, subject.home)


def _one_by_one(func: Callable[..., Any], missing: OtherStage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a function in place over lists of tensors, for those that this rank has."""
    lists = [each for each in args if isinstance(each, (list, tuple))]
    scalars = [each for each in args if not isinstance(each, (list, tuple))]
    if not lists or first_missing((scalars, kwargs)) is not None:
        raise UnsupportedError(_needs(func.__name__, missing))
    rows = list(zip(*lists, strict=True))
    here = [row for row in rows if first_missing(row) is None]
    if any(first_present(row[0]) for row in rows if first_missing(row) is not None):
        raise UnsupportedError(_needs(func.__name__, missing))
    if here:
        columns = iter([list(column) for column in zip(*here, strict=True)])
        func(*(next(columns) if isinstance(each, (list, tuple)) else each for each in args), **kwargs)


def _without_values(
    name: str, func: Callable[..., Any], missing: OtherStage, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    try:
        with torch.no_grad():
            result = func(*map_tensors(_shape_of, args), **map_tensors(_shape_of, _on_meta(kwargs)))
    except PlugframeError:
        raise
    except Exception as error:
        raise UnsupportedError(_needs(name, missing)) from error
    return map_tensors(lambda tensor: stand_in(tensor, missing.origin, missing.home), result)


def _shape_of(tensor: Tensor) -> Tensor:
    if tensor.is_meta and not isinstance(tensor, OtherStage):
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {
        key: torch.device("meta") if key == "device" and value is not None else value for key, value in kwargs.items()
    }
