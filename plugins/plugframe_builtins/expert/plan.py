"""Which submodules are experts, and how they are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from plugframe.errors import SettingError, UnsupportedError, closest
from plugframe_builtins._shared.module_paths import matches
from plugframe_builtins._shared.stage_view import complete_model
from plugframe_builtins.expert import STYLES
from plugframe_builtins.expert.dispatch import DISPATCHES, Dispatch

#: The attribute of a model's own plan.
ATTRIBUTE = "expert_plan"
#: The name of a list of experts that is recognized without a plan.
_NAME = "experts"

Plan = Mapping[str, str | Dispatch]


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of one layer.

    Attributes:
        path: in the model.
        module: a list of modules, or one module that stacks their weights.
        parent: the module that runs a list, None for a module.
        dispatch: what a module is called with, None for a list.
    """

    path: str
    module: nn.Module
    parent: nn.Module | None
    dispatch: Dispatch | None


def check_plan(plan: Any, where: str) -> None:
    """Raise if `plan` is not a plan.

    Raises:
        SettingError: with the accepted values.
    """
    if not isinstance(plan, Mapping) or not all(isinstance(pattern, str) for pattern in plan):
        raise SettingError(f'{where} must be a dict such as {{"layers.*.experts": "modules"}}, got {plan!r}.')
    for pattern, style in plan.items():
        if style not in STYLES and not callable(style):
            hint = closest(style, STYLES) if isinstance(style, str) else ""
            raise SettingError(
                f"{where} has {style!r} for {pattern!r}: write one of {', '.join(map(repr, STYLES))}, or a function "
                f"f(forward, exchange, *args).{hint}"
            )


def find_experts(module: nn.Module, plan: Plan | None) -> list[Experts]:
    """Return the experts that a plan names, the model's own plan, or its lists called ``experts``.

    Beside a pipeline `module` shows a stage: the plan is checked for all stages, and the experts of that one returned.

    Raises:
        SettingError: if there are none, a pattern matches nothing, or a submodule is not what the plan says.
    """
    where, name = "plan= of strategy 'expert'", type(module).__name__
    own, module = dict(module.named_modules()), complete_model(module)
    paths = dict(module.named_modules())
    if plan is None and getattr(module, ATTRIBUTE, None) is not None:
        plan, where = getattr(module, ATTRIBUTE), f"{name}.{ATTRIBUTE}"
        check_plan(plan, where)
    styles = _recognized(module, paths) if plan is None else {}
    for pattern, style in (plan or {}).items():
        found = [path for path in paths if path and matches(path, pattern)]
        if not found:
            raise SettingError(
                f"{where} names {pattern!r}, which matches no submodule of this {name}.{closest(pattern, paths)}"
            )
        styles.update((path, style) for path in found)
    made = [_of(paths, path, style, where) for path, style in styles.items()]
    for inner in made:
        outer = next(
            (each for each in made if inner is not each and f"{inner.path}.".startswith(f"{each.path}.")), None
        )
        if outer is not None:
            raise SettingError(f"{where}: the experts {inner.path!r} are within {outer.path!r}: name one of them.")
        if inner.path in own and not {id(inner.module), id(inner.parent or inner.module)} <= set(map(id, own.values())):
            raise SettingError(
                f"The experts {inner.path!r} are cut into several stages of the pipeline, and strategy 'expert' needs "
                "them in one: cut at modules that hold complete layers (split=, pipeline_plan)."
            )
    return [experts for experts in made if experts.path in own]


def _recognized(module: nn.Module, paths: Mapping[str, nn.Module]) -> dict[str, str | Dispatch]:
    named = {path: part for path, part in paths.items() if path.rpartition(".")[2] == _NAME}
    lists = [path for path, part in paths.items() if path and _is_list(part)]
    if named and all(path in lists for path in named):
        return dict.fromkeys(named, STYLES[0])
    odd = next((path for path in named if path not in lists), None)
    found = (
        f"{odd!r} is a {type(named[odd]).__name__}, not a list of alike modules"
        if odd is not None
        else f"no list is called {_NAME!r}, and its lists of alike modules are {', '.join(map(repr, lists)) or 'none'}"
    )
    example = odd or (lists[0] if lists else "layers.*.experts")
    raise SettingError(
        f"strategy 'expert' cannot tell what the experts of this {type(module).__name__} are: {found}: use "
        f'ExpertParallel(plan={{"{example}": …}}) with one of {", ".join(map(repr, STYLES))} or a function, or give '
        f"the model such an attribute {ATTRIBUTE}; {{}} is for a model without experts."
    )


def _of(paths: Mapping[str, nn.Module], path: str, style: str | Dispatch, where: str) -> Experts:
    part = paths[path]
    if style != STYLES[0]:
        if isinstance(part, nn.ModuleList):
            raise SettingError(f'{where} has {style!r} for the list {path!r}: write "{STYLES[0]}".')
        return Experts(path, part, None, DISPATCHES[style] if isinstance(style, str) else style)
    if not isinstance(part, nn.ModuleList):
        inner = [child for child, each in part.named_children() if _is_list(each)]
        if len(inner) != 1:
            raise SettingError(
                f"{where} has {STYLES[0]!r} for {path!r}, a {type(part).__name__} with {len(inner)} lists of alike "
                "modules: name the list of experts."
            )
        path, part = f"{path}.{inner[0]}", paths[f"{path}.{inner[0]}"]
    if not _is_list(part):
        raise SettingError(
            f"{where} names {path!r}, whose modules are not alike: experts that are divided over ranks have one class, "
            "and parameters of the same names and shapes."
        )
    parent = paths[path.rpartition(".")[0]]
    if type(parent).forward is nn.Module.forward or isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
        raise UnsupportedError(
            f"The experts {path!r} are in a {type(parent).__name__} without a forward: strategy 'expert' needs them in "
            "the module that runs them."
        )
    return Experts(path, part, parent, None)


def _is_list(part: nn.Module) -> bool:
    """Return whether a module is a list of two or more modules with alike parameters."""
    children = list(part.children()) if isinstance(part, nn.ModuleList) else []
    kinds = {(type(child), *_shapes(child)) for child in children}
    return len(children) > 1 and len(children) == len(part) and len(kinds) == 1 and any(_shapes(children[0]))  # type: ignore[arg-type]


def _shapes(module: nn.Module) -> list[tuple[Any, ...]]:
    return [(name, *parameter.shape, parameter.dtype) for name, parameter in module.named_parameters()]
