"""Checks of the arguments of `Lite`'s methods, before anything is modified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from plugframe.adopt import state_of
from plugframe.data.iterables import check_iterable
from plugframe.errors import OrderError, SettingError, SettingTypeError
from plugframe.lite.raw_scripts import check_wrapped


def check_module(module: Any, set_up: Sequence[nn.Module] = ()) -> None:
    """Raise unless the module is plain, with materialized parameter shapes, and was not set up before.

    Args:
        set_up: the modules that were.

    Raises:
        SettingError: for another type.
        OrderError: for a module that was set up, or that has or is a part that was.
    """
    if isinstance(module, DataLoader):
        raise SettingTypeError("setup() takes a module first, got a DataLoader: use lite.setup_dataloaders(loader).")
    if isinstance(module, Optimizer):
        raise SettingTypeError("setup() takes the module first, then its optimizers: lite.setup(model, optimizer).")
    if not isinstance(module, nn.Module):
        raise SettingTypeError(f"setup() takes a torch.nn.Module first, got {type(module).__name__}.")
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        raise SettingTypeError(f"The module is wrapped in {type(module).__name__} already: pass the module itself.")
    if state_of(module) is not None:
        raise OrderError(f"This {type(module).__name__} was set up already: set a module up once.")
    check_wrapped(module)
    for name, part in module.named_modules():
        if state_of(part) is not None:
            raise OrderError(
                f"Submodule {name!r} of this {type(module).__name__} was set up already: set up the model, or its "
                "submodules."
            )
    for parent in set_up:
        for name, part in parent.named_modules():
            if part is module:
                raise OrderError(
                    f"This {type(module).__name__} is submodule {name!r} of a {type(parent).__name__} that was set up "
                    "already: set up the model, or its submodules."
                )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise OrderError(
                f"{name!r} of this {type(module).__name__} has no shape yet: run one forward before lite.setup()."
            )
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            _check_trainable(name, parameter, type(module).__name__)


def _check_trainable(name: str, parameter: Tensor, what: str) -> None:
    """Raise for a parameter that an optimizer cannot update in place."""
    if parameter.is_inference():
        raise SettingError(
            f"Parameter {name!r} of this {what} was made under torch.inference_mode(), and can never be trained: build "
            "the model outside of it, or freeze the parameter with requires_grad_(False)."
        )
    strided = parameter.layout is torch.strided and not parameter.is_meta
    if strided and any(size > 1 and not step for size, step in zip(parameter.shape, parameter.stride(), strict=True)):
        raise SettingError(
            f"Parameter {name!r} of this {what} is expanded: several of its elements are one, which no optimizer can "
            "step. Make it a parameter of its own values, nn.Parameter(tensor.expand(...).clone()), or expand it in "
            "forward."
        )


def check_optimizers(optimizers: Sequence[Any]) -> None:
    """Raise unless these are plain optimizers that were not set up before.

    Raises:
        SettingError: for another type.
        OrderError: for an optimizer that was set up.
    """
    _refuse_twice(optimizers)
    for optimizer in optimizers:
        if isinstance(optimizer, DataLoader):
            raise SettingTypeError("A DataLoader was passed as an optimizer: use lite.setup_dataloaders(loader).")
        if isinstance(optimizer, nn.Module):
            raise SettingTypeError("A second module was passed as an optimizer: call lite.setup() for each module.")
        if not isinstance(optimizer, Optimizer):
            what = type(optimizer).__name__
            raise SettingTypeError(
                f"{what} was passed as an optimizer: pass torch optimizers; schedulers need no set-up."
            )
        if state_of(optimizer) is not None:
            raise OrderError(f"This {type(optimizer).__name__} was set up already: set an optimizer up once.")


def check_ownership(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raise if an optimizer holds parameters of another model.

    Raises:
        SettingError: saying how many.
    """
    own = {id(parameter) for parameter in module.parameters()}
    for optimizer in optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        foreign = sum(id(p) not in own for p in held)
        if foreign:
            raise SettingError(
                f"{foreign} of the {len(held)} parameters of this {type(optimizer).__name__} are not parameters of "
                f"this {type(module).__name__}: pass the model's own optimizer, or set them up apart with "
                "lite.setup_module() and lite.setup_optimizers()."
            )


def check_loaders(loaders: Sequence[Any]) -> None:
    """Raise unless these are plain DataLoaders, or iterables of batches, that were not set up before.

    Raises:
        SettingError: for another type.
        OrderError: for a loader that was set up.
    """
    if not loaders:
        raise SettingError("setup_dataloaders() takes at least one DataLoader, got none.")
    _refuse_twice(loaders)
    for loader in loaders:
        check_iterable(loader)
        if state_of(loader) is not None:
            raise OrderError(f"This {type(loader).__name__} was set up already: set a loader up once.")


def _refuse_twice(objects: Sequence[Any]) -> None:
    if len({id(obj) for obj in objects}) < len(objects):
        names = ", ".join(type(obj).__name__ for obj in objects)
        raise SettingError(f"One object was passed twice among {names}: pass each once.")


def check_loss(loss: Any, *, set_up: bool) -> None:
    """Raise for a backward before anything was set up, or if the loss is not a tensor.

    Raises:
        OrderError: before set-up.
        SettingError: for another type.
    """
    if not set_up:
        raise OrderError("backward() before any model was set up: call lite.setup(model, optimizer) first.")
    if not isinstance(loss, Tensor):
        raise SettingTypeError(f"backward() takes the loss as a tensor, got {type(loss).__name__}.")


def check_set_up(module: Any, call: str, hooks: Any) -> None:
    """Raise for a module or optimizer that was not set up by the `Lite` with these hooks.

    Raises:
        OrderError: saying what to call.
    """
    state = state_of(module)
    what = type(module).__name__
    if state is not None and getattr(state, "hooks", hooks) is not hooks:
        raise OrderError(f"{call}() takes what this Lite has set up, and this {what} was set up by another one.")
    if state is None:
        raise OrderError(f"{call}() takes a module that was set up, and this {what} was not: call lite.setup() first.")


def check_holds(module: nn.Module, optimizer: Optimizer, call: str) -> None:
    """Raise if an optimizer holds no parameter of the module.

    Raises:
        SettingError: naming both.
    """
    held = [p for group in optimizer.param_groups for p in group["params"]]
    # A fast path, as this is called in every step: the first parameters are nearly always identical.
    if held and not any(p is held[0] for p in module.parameters()):
        own = {id(p) for p in module.parameters()}
        if not any(id(p) in own for p in held):
            raise SettingError(
                f"{call}() takes a module and its optimizer, and this {type(optimizer).__name__} holds no parameter of "
                f"this {type(module).__name__}."
            )


def check_limits(clip_val: Any, max_norm: Any) -> None:
    """Raise unless exactly one limit is given, and it is above 0.

    Raises:
        SettingError: saying what to pass.
    """
    if (clip_val is None) == (max_norm is None):
        got = f"clip_val={clip_val!r}, max_norm={max_norm!r}"
        raise SettingError(f"clip_gradients() takes one of clip_val= and max_norm=, got {got}.")
    limit = clip_val if max_norm is None else max_norm
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
        raise SettingError(f"clip_gradients() takes a limit above 0, got {limit!r}.")
