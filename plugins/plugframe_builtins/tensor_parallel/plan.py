"""Tensor-parallel plans: layers to split, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from plugframe.errors import SettingError, closest
from plugframe_builtins._shared.module_paths import matches
from plugframe_builtins._shared.stage_view import complete_model
from plugframe_builtins.tensor_parallel.checks import check_divisible, refuse_second_derivatives


def _gathering() -> ParallelStyle:
    return ColwiseParallel(output_layouts=Replicate())


#: The styles by name, for plans in settings files and models.
STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_gather": _gathering,
    "rowwise": RowwiseParallel,
    "sequence": SequenceParallel,
}
#: Those of Hugging Face's plans (``tp_plan``) that are styles of torch; None leaves a layer as it is.
_HUGGING_FACE: dict[str, Callable[[], ParallelStyle] | None] = {
    "colwise_rep": _gathering,
    "colwise_gather_output": _gathering,
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_colwise": _gathering,
    "sequence_parallel": SequenceParallel,
    "replicate": None,
}

#: Module paths, with ``*`` for one component: ``{"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}``.
Plan = Mapping[str, str | ParallelStyle]


def check_plan(plan: Any, where: str) -> None:
    """Raise if `plan` is not a plan.

    Raises:
        SettingError: with the accepted values.
    """
    if not isinstance(plan, Mapping) or not plan:
        raise SettingError(f'{where} must be a dict such as {{"blocks.*.up": "colwise"}}, got {plan!r}.')
    for pattern, style in plan.items():
        if isinstance(style, ParallelStyle):
            continue
        if style not in (*STYLES, *_HUGGING_FACE):
            hint = closest(style, STYLES) if isinstance(style, str) else ""
            raise SettingError(
                f"{where} has {style!r} for {pattern!r}: write one of {', '.join(map(repr, STYLES))}, or a "
                f"ParallelStyle of torch.{hint}"
            )


def of_hugging_face(module: nn.Module, plan: Mapping[str, Any], where: str) -> Plan:
    """Return a plan that a Hugging Face model brings.

    Raises:
        SettingError: if it is that of a model within the module, or has styles that are none of torch.
    """
    rest = 'pass one: TensorParallel(plan={"layers.*.up": "colwise", …}), or use strategy=\'fsdp\'.'
    paths = [path for path, _ in module.named_modules() if path]
    if not any(matches(path, pattern) for pattern in plan for path in paths):
        raise SettingError(
            f"{where} is that of another model, and names nothing in this {type(module).__name__}: {rest}"
        )
    odd = {pattern: style for pattern, style in plan.items() if style not in _HUGGING_FACE and style not in STYLES}
    if odd:
        pattern, style = next(iter(odd.items()))
        raise SettingError(
            f"{where} has {style!r} for {pattern!r}, a style that strategy 'tensor_parallel' does not have: {rest}"
        )
    return plan


def _made(style: str | ParallelStyle) -> ParallelStyle | None:
    if not isinstance(style, str):
        return style
    make = STYLES[style] if style in STYLES else _HUGGING_FACE[style]
    return None if make is None else make()


def apply_plan(module: nn.Module, plan: Plan, mesh: DeviceMesh, where: str) -> None:
    """Split the layers of `module` named by `plan` over the ranks of `mesh`, in place. Called on every rank.

    Beside a pipeline `module` shows a stage; the plan is checked for all stages.

    Raises:
        SettingError: if a pattern matches no submodule, or a layer that cannot be split evenly.
    """
    complete, own = complete_model(module), dict(module.named_modules())
    parts = dict(complete.named_modules())
    given: dict[str, str | ParallelStyle] = {}
    for pattern, style in plan.items():
        paths = [path for path in parts if path and matches(path, pattern)]
        if not paths:
            raise SettingError(
                f"{where} names {pattern!r}, which matches no submodule of this {type(module).__name__}."
                f"{closest(pattern, [path for path in parts if path])}"
            )
        given.update((path, style) for path in paths)
    check_divisible(given, complete, mesh.size(), where)
    exact = {path: made for path, style in given.items() if path in own and (made := _made(style)) is not None}
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parallelize_module(module, mesh, exact)
    if mesh.size() > 1:
        refuse_second_derivatives({path: parts[path] for path in exact})
    for shared in names.values():
        _tie_again(module, shared, where)


def _tie_again(module: nn.Module, shared: list[str], where: str) -> None:
    """Make the names of one parameter one again, after each of its layers was split by itself.

    Raises:
        SettingError: if the layers were not split alike: an optimizer would update only one of the parameters.
    """
    now = dict(module.named_parameters(remove_duplicate=False))
    first = now[shared[0]]
    for name in shared[1:]:
        other = now[name]
        if other is first:
            continue
        if not (isinstance(first, DTensor) and isinstance(other, DTensor) and first.placements == other.placements):
            raise SettingError(
                f"{where} splits a layer whose parameter is shared: {' and '.join(map(repr, shared))} are one, and "
                "would be two. Split all of its layers along the same dimension, or leave them out of the plan."
            )
        path, _, own = name.rpartition(".")
        module.get_submodule(path)._parameters[own] = first
