"""The blocks of a model between which the sequence is divided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from plugframe.errors import SettingError, UnsupportedError, closest
from plugframe_builtins._shared.module_paths import matches

#: The attribute of a model's own blocks.
ATTRIBUTE = "context_parallel_blocks"


def find_blocks(module: nn.Module, given: Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the blocks by path, in order: those of given patterns, of the model's attribute, or its only list.

    Raises:
        SettingError: if a pattern matches nothing, there is no single list, or a block is there twice.
    """
    where = "blocks= of strategy 'context'"
    name = type(module).__name__
    if given is None:
        own = getattr(module, ATTRIBUTE, None)
        given, where = ([own] if isinstance(own, str) else own), f"{name}.{ATTRIBUTE}"
    paths = {path: part for path, part in module.named_modules(remove_duplicate=False) if path}
    if given is None:
        return _unique(_only_list(module), name)
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(each, str) for each in given):
        raise SettingError(f'{where} is {given!r}: write a list of paths such as ["blocks.*"].')
    chosen: set[str] = set()
    for pattern in given:
        found = {path for path in paths if matches(path, pattern)}
        if not found:
            raise SettingError(f"{where} names {pattern!r}, and {name} has no such submodule.{closest(pattern, paths)}")
        chosen |= found
    return _unique({path: part for path, part in paths.items() if path in chosen}, name)


def refuse_batch_norms(blocks: dict[str, nn.Module]) -> None:
    """Raise if a block has a layer whose training statistics would be those of a part of the tokens.

    Raises:
        UnsupportedError: naming the layer.
    """
    for path, block in blocks.items():
        for inner, part in block.named_modules():
            if isinstance(getattr(part, "running_mean", None), Tensor):
                where = f"{path}.{inner}".rstrip(".")
                raise UnsupportedError(
                    f"strategy 'context' divides the tokens, and {type(part).__name__} {where!r} computes statistics "
                    "over all of them: use LayerNorm or RMSNorm, or blocks= without it."
                )


def refuse_compiled(module: nn.Module, blocks: dict[str, nn.Module]) -> None:
    """Raise if what runs the blocks, or a block, is compiled: torch's compiler does not trace what is divided.

    Raises:
        UnsupportedError: naming the compiled submodule.
    """
    chosen = {id(block) for block in blocks.values()}
    for path, part in module.named_modules():
        if part._compiled_call_impl is not None and any(id(inner) in chosen for inner in part.modules()):
            name = f"{type(part).__name__} {path!r}" if path else type(part).__name__
            raise UnsupportedError(
                f"{name} is compiled, and strategy 'context' cannot divide blocks that run in compiled code: compile "
                "submodules without blocks only, such as the head."
            )


def _only_list(module: nn.Module) -> dict[str, nn.Module]:
    lists: dict[str, dict[str, nn.Module]] = {}
    inside: set[int] = set()
    for path, part in module.named_modules(remove_duplicate=False):
        if id(part) in inside or not isinstance(part, (nn.ModuleList, nn.Sequential)):
            continue
        blocks = _repeated(part)
        if blocks:
            prefix = f"{path}." if path else ""
            lists[path] = {f"{prefix}{number}": block for number, block in blocks.items()}
            inside |= {id(inner) for block in blocks.values() for inner in block.modules()}
    if len(lists) == 1:
        return next(iter(lists.values()))
    found = (
        f"its lists of blocks are {' and '.join(map(repr, lists))}" if lists else "it has no list of repeated blocks"
    )
    raise SettingError(
        f"strategy 'context' cannot tell which blocks of this {type(module).__name__} take a part of the sequence: "
        f'{found}. Pass ContextParallel(blocks=["layers.*"]), or give the model such an attribute {ATTRIBUTE}.'
    )


def _repeated(container: Any) -> dict[str, nn.Module]:
    """Return the blocks of a container, if it has two or more of one class with submodules, and no others."""
    children = dict(container.named_children())
    times = Counter(type(child) for child in children.values() if any(True for _ in child.children()))
    repeated = {path: child for path, child in children.items() if times[type(child)] > 1}
    right = len(repeated) == len(children) and not any(isinstance(child, nn.ModuleList) for child in repeated.values())
    return repeated if right else {}


def _unique(blocks: dict[str, nn.Module], name: str) -> dict[str, nn.Module]:
    """Return the blocks; raise if one is there twice, or within another."""
    inner: dict[int, str] = {}
    for path, block in blocks.items():
        for part in block.modules():
            if part is not block:
                inner[id(part)] = path
    seen: dict[int, str] = {}
    for path, block in blocks.items():
        other = seen.setdefault(id(block), path)
        if other != path or id(block) in inner:
            raise SettingError(
                f"strategy 'context': block {path!r} of this {name} is {inner.get(id(block), other)!r} too, or within "
                "it: name each block once."
            )
    return blocks
