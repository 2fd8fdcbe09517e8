"""Units: the blocks of a model that are sharded, gathered and freed as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from plugframe.errors import SettingError, UnsupportedError, closest

#: Values of `units=`: ``"auto"``, classes or names of classes, or ``f(module) -> bool``.
Units = str | Collection[type[nn.Module] | str] | Callable[[nn.Module], bool]


def check_units(units: Any) -> None:
    """Raise if `units` does not select modules.

    Raises:
        SettingError: with the accepted values.
    """
    if units == "auto" or (callable(units) and not isinstance(units, type)):
        return
    if isinstance(units, (set, frozenset, list, tuple)) and units and all(map(_is_class, units)):
        return
    raise SettingError(
        f"units={units!r} of strategy 'fsdp' must be 'auto', a set of module classes or their names such as "
        "{Block}, or a function f(module) -> bool."
    )


def find_units(module: nn.Module, units: Units, *, min_numel: int) -> list[nn.Module]:
    """Return the units of `module`, inner ones before outer ones, excluding itself.

    Under ``"auto"`` these are the repeated blocks in lists (``nn.ModuleList``, and ``nn.Sequential`` of blocks
    with children), and every module with at least `min_numel` elements of direct parameters.

    Raises:
        SettingError: if the module has no submodule of a given class.
    """
    if units == "auto":
        chosen = _automatic(module, min_numel)
    elif callable(units):
        chosen = {id(part) for part in module.modules() if units(part)}
    else:
        chosen = _of_classes(module, units)
    found = [part for part in module.modules() if id(part) in chosen and part is not module and _has_parameters(part)]
    return _sharing_apart(module, found)[::-1]  # modules() gives an outer one first


def split_dtypes(module: nn.Module, units: list[nn.Module]) -> list[nn.Module]:
    """Return additional units: submodules with another parameter dtype than most of their unit.

    torch reduces the gradients of a unit in one tensor, of one dtype.

    Raises:
        UnsupportedError: if the direct parameters of one submodule have several dtypes.
    """
    more: list[nn.Module] = []
    by_home: dict[int, list[nn.Module]] = {}
    for part, home in _homes(module, units):
        by_home.setdefault(home, []).append(part)
    for parts in by_home.values():
        size: Counter[torch.dtype] = Counter()
        for part in parts:
            size.update({p.dtype: p.numel() for p in part.parameters(recurse=False)})
        for part in parts if len(size) > 1 else ():
            dtypes = {p.dtype for p in part.parameters(recurse=False)}
            if len(dtypes) > 1:
                raise UnsupportedError(
                    f"Parameters of one {type(part).__name__} are of {' and '.join(sorted(map(str, dtypes)))}: "
                    "strategy 'fsdp' needs one dtype per module. Convert them."
                )
            if dtypes and dtypes != {size.most_common(1)[0][0]} and part is not module:
                more.append(part)
    return more


def _of_classes(module: nn.Module, units: Any) -> set[int]:
    classes = tuple(unit for unit in units if isinstance(unit, type))
    names = {unit for unit in units if isinstance(unit, str)}
    parts = [part for part in module.modules() if isinstance(part, classes) or type(part).__name__ in names]
    for unit in units:
        if not any(isinstance(part, unit) if isinstance(unit, type) else type(part).__name__ == unit for part in parts):
            name = unit.__name__ if isinstance(unit, type) else unit
            known = {type(part).__name__ for part in module.modules()}
            raise SettingError(
                f"units= of strategy 'fsdp' names {name!r}, and this {type(module).__name__} has no such submodule."
                f"{closest(name, known)}"
            )
    return {id(part) for part in parts}


def _automatic(module: nn.Module, min_numel: int) -> set[int]:
    chosen: set[int] = set()
    inside: set[int] = set()  # modules inside a unit: the outermost list counts
    for part in module.modules():
        if id(part) in inside:
            continue
        if isinstance(part, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            blocks = [block for block in _repeated(part) if isinstance(part, nn.ModuleList) or _has_parts(block)]
            chosen.update(map(id, blocks))
            inside.update(id(inner) for block in blocks for inner in block.modules())
    for part in module.modules():
        if sum(p.numel() for p in part.parameters(recurse=False)) >= min_numel:
            chosen.add(id(part))
    return chosen


def _repeated(container: nn.Module) -> list[nn.Module]:
    children = list(container.children())
    times = Counter(type(child) for child in children)
    # A list of lists is searched, and has no forward of its own.
    return [child for child in children if times[type(child)] > 1 and not _is_container(child)]


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def keeps_statistics(module: nn.Module) -> list[nn.Module]:
    """Return the norms with parameters and running statistics, which torch's kernels need in one dtype."""
    norms = [part for part in module.modules() if isinstance(getattr(part, "running_mean", None), torch.Tensor)]
    return [part for part in norms if isinstance(getattr(part, "weight", None), nn.Parameter)]


def _sharing_apart(module: nn.Module, units: list[nn.Module]) -> list[nn.Module]:
    """Drop units that share a parameter with the rest of the model: they are sharded with the root."""
    kept = list(units)
    while True:
        homes: dict[int, set[int]] = {}
        for part, home in _homes(module, kept):
            for parameter in part.parameters(recurse=False):
                homes.setdefault(id(parameter), set()).add(home)
        shared = {home for several in homes.values() if len(several) > 1 for home in several}
        if not shared - {id(module)}:
            return kept
        kept = [unit for unit in kept if id(unit) not in shared]


def _homes(module: nn.Module, units: list[nn.Module]) -> list[tuple[nn.Module, int]]:
    """Return every submodule of `module` with its innermost unit."""
    chosen = {id(unit) for unit in units}
    found: list[tuple[nn.Module, int]] = []

    def walk(part: nn.Module, home: int) -> None:
        home = id(part) if id(part) in chosen else home
        found.append((part, home))
        for child in part.children():
            walk(child, home)

    walk(module, id(module))
    return found


def _has_parts(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _has_parameters(module: nn.Module) -> bool:
    return not _is_container(module) and any(True for _ in module.parameters())


def _is_class(unit: Any) -> bool:
    return isinstance(unit, str) or (isinstance(unit, type) and issubclass(unit, nn.Module))


def prefetch(units: Sequence[Any], depth: int) -> None:
    """Have every unit gather the `depth` units after it ahead, in forward and in backward; in the order of forward."""
    for number, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(list(units[number + 1 : number + 1 + depth]))
        unit.set_modules_to_backward_prefetch(list(units[max(0, number - depth) : number][::-1]))
