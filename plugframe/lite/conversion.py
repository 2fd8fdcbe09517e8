"""What a precision changed in a module, compared with what the strategy supports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from plugframe.adopt import release_module, state_of
from plugframe.errors import OrderError, UnsupportedError

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite


M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Before:
    """A module before its conversion.

    Attributes:
        modules: class of each submodule by path.
        parameters: class and dtype of each parameter by name.
    """

    modules: Mapping[str, type]
    parameters: Mapping[str, tuple[type, torch.dtype]]

    @classmethod
    def of(cls, module: nn.Module) -> Before:
        """Record a module."""
        return cls(
            {path: type(part) for path, part in module.named_modules()},
            {name: (_class(p), p.dtype) for name, p in module.named_parameters(remove_duplicate=False)},
        )

    def changes(self, module: nn.Module) -> Iterator[tuple[str, str]]:
        """Yield the capabilities that a conversion took, each with the submodule or parameter that shows it."""
        for path, part in module.named_modules():
            if self.modules.get(path) is not type(part):
                yield "replaces-modules", f"submodule {path!r} is a {type(part).__name__}"
        for name, parameter in module.named_parameters(remove_duplicate=False):
            old_class, old_dtype = self.parameters.get(name, (None, None))
            if old_class is not _class(parameter) and _class(parameter) is not Tensor:
                yield "tensor-subclasses", f"parameter {name!r} is a {_class(parameter).__name__}"
            if old_dtype is not parameter.dtype and parameter.is_floating_point():
                yield (
                    f"{str(parameter.dtype).removeprefix('torch.')}-parameters",
                    f"parameter {name!r} is {parameter.dtype}",
                )


def check_conversion(lite: Lite, before: Before, module: nn.Module) -> None:
    """Raise if a precision did to a module what the strategy cannot take, and does not list.

    Raises:
        UnsupportedError: naming both, and the submodule or parameter.
    """
    strategy, precision = lite.plan.choices["strategy"], lite.plan.choices["precision"]
    conflicts = strategy.descriptor.conflicts.get("precision", ())
    if not conflicts:
        return
    for capability, found in before.changes(module):
        if capability in conflicts:
            raise UnsupportedError(
                f"strategy={strategy.name!r} does not support {capability!r}, and precision={precision.name!r} has "
                f"converted this {type(module).__name__} so: its {found}. Use another precision, or another strategy."
            )


def _class(parameter: Tensor) -> type:
    """Return the class of a parameter's data: `nn.Parameter` wraps plain tensors, and passes subclasses through."""
    return Tensor if type(parameter) in (Tensor, nn.Parameter) else type(parameter)


def finalize(lite: Lite, module: M) -> M:
    """Return a trained module in the final form of the precision; see `Lite.finalize`."""
    if state_of(module) is None or module not in lite._living():
        raise OrderError(f"finalize() takes a module that was set up, and this {type(module).__name__} was not.")
    strategy = lite.plan.choices["strategy"]
    if "sharded" in strategy.descriptor.provides:
        raise UnsupportedError(
            f"finalize() needs all values of a module, and strategy {strategy.name!r} holds shards of it: save it, "
            "load it in a job of one rank, and finalize it there."
        )
    lite._modules[:] = [reference for reference in lite._modules if reference() is not module]
    release_module(module)
    final: M = lite._hooks.precision_finalize(module=module)
    return final
