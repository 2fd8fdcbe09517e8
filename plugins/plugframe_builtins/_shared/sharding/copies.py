"""Copies of sharded modules as plain modules, and user attributes of parameters while they are gathered."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from plugframe.errors import UnsupportedError

_COPY = "__deepcopy__"
#: Where torch keeps the state of a sharded module (a private name, as of torch 2.13).
_STATE = "__composable_api"
#: Modules whose hooks belong to the sharding and are not copied.
_OURS = ("torch.distributed.", "plugframe_builtins.")


def allow_copies(module: nn.Module, units: Iterable[nn.Module]) -> None:
    """Make units copyable, as plain modules with full parameters, where torch raises. Every rank must copy."""
    for unit in units:
        # copy.deepcopy looks the method up on the instance, so that the classes torch shares between models stay.
        unit.__dict__[_COPY] = _Copier(unit)


class _Copier:
    def __init__(self, unit: nn.Module) -> None:
        self._unit = unit

    def __call__(self, memo: dict[int, Any]) -> Any:
        unit = self._unit
        if any(part._parameters and _is_split_by_a_plan(part) for part in unit.modules()):
            raise UnsupportedError(
                f"This {type(unit).__name__} is split by a tensor-parallel plan and cannot be copied: copy it before "
                "lite.setup(), or load lite.state_dict(model) into a plain one."
            )
        plain: Any = object.__new__(_plain_class(type(unit)))
        memo[id(unit)] = plain
        for key, value in unit.__dict__.items():
            if key == _COPY or str(key).startswith(_STATE):
                continue
            if key.endswith("_hooks") and isinstance(value, dict):
                value = type(value)((number, hook) for number, hook in value.items() if not _is_ours(hook))
            plain.__dict__[key] = copy.deepcopy(value, memo)
        return plain


def _plain_class(cls: type) -> type:
    return next(base for base in cls.__mro__ if not issubclass(base, FSDPModule) and issubclass(base, nn.Module))


def _is_split_by_a_plan(part: nn.Module) -> bool:
    return any(isinstance(p, DTensor) and p.device_mesh.ndim > 1 and "tensor" in _axes(p) for p in part.parameters())


def _axes(parameter: DTensor) -> tuple[str, ...]:
    return parameter.device_mesh.mesh_dim_names or ()


def _is_ours(hook: Any) -> bool:
    function = getattr(hook, "__func__", getattr(hook, "hook", getattr(hook, "func", hook)))
    owner = getattr(function, "__module__", None) or type(hook).__module__
    return str(owner).startswith(_OURS)


def keep_attributes(module: nn.Module) -> None:
    """Make user attributes of parameters available on the gathered parameters too."""
    for part in module.modules():
        kept = {
            name: {key: value for key, value in vars(parameter).items() if not key.startswith("_")}
            for name, parameter in part._parameters.items()
            if parameter is not None
        }
        if any(kept.values()):
            part.register_forward_pre_hook(_restoring(kept))


def _restoring(kept: dict[str, dict[str, Any]]) -> Callable[[nn.Module, Any], None]:
    def restore(part: nn.Module, _: Any) -> None:
        for name, attributes in kept.items():
            parameter = part._parameters.get(name)
            if parameter is not None and attributes and not isinstance(parameter, DTensor):
                vars(parameter).update(attributes)

    return restore
