"""Where a model is cut: the stage of every module, parameter and buffer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from plugframe.errors import SettingError, UnsupportedError, closest

#: The attribute of a model's own cut.
ATTRIBUTE = "pipeline_plan"

#: Paths of the modules that start a stage after the first; or patterns of paths for every stage.
Split = Sequence[str] | Sequence[Sequence[str]]


@dataclass(frozen=True, eq=False)
class Cut:
    """A model cut into stages.

    Attributes:
        num_stages: number of stages.
        units: the largest modules with parameters that lie in one stage, by path, with their stage. A module with
            buffers only (rotary positions) runs on every rank, unless the cut names it.
        owners: stage of every parameter and buffer by name; None for buffers that every rank keeps.
    """

    num_stages: int
    units: dict[str, int]
    owners: dict[str, int | None]


def check_split(split: Any, where: str) -> None:
    """Raise if `split` is not a cut.

    Raises:
        SettingError: with the accepted values.
    """
    names = isinstance(split, (list, tuple)) and all(isinstance(each, str) for each in split)
    lists = isinstance(split, (list, tuple)) and all(
        isinstance(each, (list, tuple)) and each and all(isinstance(name, str) for name in each) for each in split
    )
    if not split or not (names or lists):
        raise SettingError(
            f"{where} must list the modules that start a new stage, such as ['layers.4'], or the modules of every "
            f"stage, such as [['embed', 'layers.0'], ['layers.1', 'head']], got {split!r}."
        )


def make_cut(module: nn.Module, split: Split | None, num_stages: int, where: str) -> Cut:
    """Return the cut of `module` into `num_stages` stages.

    Args:
        split: the user's or the model's own cut; None for a balanced one.
        where: what named the cut, for messages.

    Raises:
        SettingError: if the cut does not fit the model.
        UnsupportedError: if two stages would share a parameter.
    """
    paths = [path for path, _ in module.named_modules()]
    if split is None:
        split = balanced_split(module, num_stages)
    if split and not isinstance(split[0], str):
        stages = _by_patterns(module, split, where)
        found = len(split)
        named = {path for path in stages if any(fnmatchcase(path, name) for names in split for name in names)}
    else:
        named = {path for path in split if isinstance(path, str)}
        stages = _by_starts(paths, split, where, type(module).__name__)  # type: ignore[arg-type]
        found = len(split) + 1
    if found != num_stages:
        raise SettingError(
            f"{where} cuts this {type(module).__name__} into {found} stages, and there are to be {num_stages}: name "
            "as many starts of stages as there are stages after the first, or set stages=."
        )
    units = _units(module, stages, named)
    owners = _owners(module, stages, units)
    _check_shared(module, owners)
    empty = sorted(set(range(num_stages)) - set(units.values()))
    if empty:
        raise SettingError(f"{where} gives stage {empty[0]} of this {type(module).__name__} no parameters to hold.")
    return Cut(num_stages, units, owners)


def _by_starts(paths: Sequence[str], split: Sequence[str], where: str, what: str) -> dict[str, int]:
    """Return the stage of every module: each start, and all modules after it in the order of definition."""
    order = {path: number for number, path in enumerate(paths)}
    for path in split:
        if path not in order or not path:
            raise SettingError(
                f"{where} names {path!r}, which is no submodule of this {what}.{closest(path, [p for p in paths if p])}"
            )
    starts = [order[path] for path in split]
    if sorted(set(starts)) != starts:
        raise SettingError(
            f"{where} must name the starts of stages in the order in which the {what} defines its modules, each once, "
            f"got {list(split)!r}."
        )
    return {path: sum(start <= number for start in starts) for path, number in order.items()}


def _by_patterns(module: nn.Module, split: Sequence[Sequence[str]], where: str) -> dict[str, int]:
    """Return the stage of every module: that of the pattern for it, or for the nearest module around it."""
    paths = [path for path, _ in module.named_modules() if path]
    for name in (name for names in split for name in names):
        if not any(fnmatchcase(path, name) for path in paths):
            raise SettingError(
                f"{where} names {name!r}, which matches no submodule of this {type(module).__name__}."
                f"{closest(name, paths)}"
            )
    stages: dict[str, int] = {}
    for path, part in module.named_modules():
        own = [stage for stage, names in enumerate(split) if any(fnmatchcase(path, name) for name in names)]
        if len(own) > 1:
            raise SettingError(f"{where} puts {path!r} into stage {own[0]} and into stage {own[1]}.")
        inherited = stages.get(path.rpartition(".")[0], -1) if path else -1
        stages[path] = own[0] if path and own else inherited
        holds = next(part.parameters(recurse=False), None) is not None
        if path and holds and stages[path] < 0:
            raise SettingError(f"{where} puts {path!r} into no stage: name it, or a module around it.")
    return {path: max(stage, 0) for path, stage in stages.items()}


def _units(module: nn.Module, stages: Mapping[str, int], named: Collection[str]) -> dict[str, int]:
    units: dict[str, int] = {}

    def visit(path: str, part: nn.Module) -> None:
        prefix = f"{path}." if path else ""
        # A module at a second path has the stage of what is around it.
        inside = {stages.get(f"{prefix}{name}" if name else path, stages[path]) for name, _ in part.named_modules()}
        holds = next(part.parameters(), None) is not None or path in named
        if path and holds and len(inside) == 1:
            units[path] = inside.pop()
        elif holds:
            for name, child in part.named_children():
                visit(prefix + name, child)

    visit("", module)
    return units


def _owners(module: nn.Module, stages: Mapping[str, int], units: Mapping[str, int]) -> dict[str, int | None]:
    owners: dict[str, int | None] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        unit = next((units[above] for above in _above(path) if above in units), None)
        for name, _ in part.named_parameters(recurse=False, remove_duplicate=False):
            owners[prefix + name] = unit if unit is not None else stages.get(path, 0)
        for name, _ in part.named_buffers(recurse=False, remove_duplicate=False):
            owners[prefix + name] = unit  # a buffer beside modules of several stages stays on every rank
    return owners


def _above(path: str) -> Iterable[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _check_shared(module: nn.Module, owners: Mapping[str, int | None]) -> None:
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if owners[other] != owners[name]:
            raise UnsupportedError(
                f"{other!r} and {name!r} are one parameter, in stages {owners[other]} and {owners[name]}: strategy "
                "'pipeline' does not tie weights between stages. Cut the model so that both are in one stage, or untie "
                "them."
            )


def balanced_split(module: nn.Module, num_stages: int) -> list[str]:
    """Return the starts of stages with about equal numbers of parameters, between the blocks of the largest container.

    Raises:
        SettingError: if the model has no container with enough blocks.
    """
    if num_stages == 1:
        return []
    what = type(module).__name__
    containers = {
        path: part
        for path, part in module.named_modules()
        if isinstance(part, (nn.Sequential, nn.ModuleList)) and len(part) > 1
    }
    path = max(containers, key=lambda each: _numel(containers[each]), default=None)
    blocks = (
        {} if path is None else {f"{path}." * bool(path) + name: b for name, b in containers[path].named_children()}
    )
    held = [each for each, block in blocks.items() if _numel(block)]
    if len(held) < num_stages or 2 * sum(map(_numel, blocks.values())) < _numel(module):
        raise SettingError(
            f"strategy 'pipeline' finds no nn.Sequential or nn.ModuleList with {num_stages} blocks in this {what} to "
            f"cut it at: use Pipeline(split=['layers.4', …]) with the modules that start a stage, or give the model "
            f"such an attribute {ATTRIBUTE}."
        )
    sizes = [_numel(blocks[each]) for each in held]
    order = [each for each, _ in module.named_modules()]
    before, inside = order.index(held[0]), {id(p) for block in blocks.values() for p in block.parameters()}
    for number, name in enumerate(order):
        own = sum(p.numel() for p in module.get_submodule(name).parameters(recurse=False) if id(p) not in inside)
        sizes[0 if number < before else -1] += own
    return [held[start] for start in _starts(sizes, num_stages)]


def _starts(sizes: Sequence[int], count: int) -> list[int]:
    """Return where to cut `sizes` into `count` contiguous parts so that the largest is smallest."""
    best: dict[tuple[int, int], tuple[int, list[int]]] = {}
    for end in range(1, len(sizes) + 1):
        best[1, end] = sum(sizes[:end]), []
        for parts in range(2, min(count, end) + 1):
            options = [
                (max(best[parts - 1, start][0], sum(sizes[start:end])), [*best[parts - 1, start][1], start])
                for start in range(parts - 1, end)
            ]
            best[parts, end] = min(options)
    return best[count, len(sizes)][1]


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def buffers_of(module: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Return the buffers by name, each with the module that holds it and its name there."""
    found = {}
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            found[f"{path}." * bool(path) + name] = (part, name, buffer)
    return found
