"""Tensors of other stages: they have a shape and no values, and computing with them gives more of them.

Every rank runs the user's own forward. Until it reaches the first module of its stage, it computes with a `StandIn` for
what earlier stages compute: torch's shape arithmetic on the meta device, at no cost. The received activation then
takes the place of the stand-in. Values that are still missing at the end are an error, never a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


class OtherParameter(OtherStage, nn.Parameter):
    """A parameter of another stage: still the user's object, in the optimizers too, without storage."""


def stand_in(like: Tensor, origin: str, home: torch.device) -> StandIn:
    """Return a stand-in of the shape and dtype of `like`."""
    meta = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
    made = meta.as_subclass(StandIn)
    made.origin, made.home, made.value = origin, home, None
    return made


@torch.no_grad()
def give_up(parameter: nn.Parameter, origin: str) -> None:
    """Free the values of a parameter; the object stays, and computing with it gives stand-ins."""
    home = parameter.device
    parameter.grad = None
    parameter.data = parameter.data.new_empty((1,) * parameter.dim()).expand(parameter.shape)
    parameter.__class__ = OtherParameter
    other: Any = parameter
    other.origin, other.home = origin, home


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
        if name == "to":
            args, kwargs = _without_devices(args), {k: v for k, v in kwargs.items() if k != "device"}
            if len(args) + len(kwargs) == 1:
                return missing
        if name in ("cpu", "cuda", "xpu"):
            return missing
        return _without_values(name, func, missing, args, kwargs)


def _about(func: Callable[..., Any], subject: OtherStage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = func(*args, **kwargs)
    if func == Tensor.device.__get__:
        return subject.home
    if func == Tensor.is_meta.__get__:  # type: ignore[attr-defined]
        return False
    if not isinstance(result, Tensor) or result is subject:
        return result
    return stand_in(result, subject.origin, subject.home)


def _without_values(
    name: str, func: Callable[..., Any], missing: OtherStage, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    try:
        with torch.no_grad():
            result = func(*map_tensors(_shape_of, args), **map_tensors(_shape_of, _on_meta(kwargs)))
    except PlugframeError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{name}() needs values that this rank does not have: {missing.origin}. A model's forward must pass what "
            "one stage computes to the next only through the modules that start it."
        ) from error
    return map_tensors(lambda tensor: stand_in(tensor, missing.origin, missing.home), result)


def _shape_of(tensor: Tensor) -> Tensor:
    if tensor.is_meta and not isinstance(tensor, OtherStage):
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {
        key: torch.device("meta") if key == "device" and value is not None else value for key, value in kwargs.items()
    }


def _without_devices(args: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(each for each in args if not isinstance(each, (torch.device, str)))
