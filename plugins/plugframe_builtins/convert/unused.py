"""Imports and devices that a converted script no longer uses."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

import libcst as cst

from plugframe_builtins.convert.edits import Edits
from plugframe_builtins.convert.script import Script, code, dotted


def convert(text: str, before: Script) -> str:
    """Remove what the script used before it was converted and does not use now."""
    text = _without_devices(text)
    script = Script(text)
    edits = Edits(script)
    now, then = _used(script), _used(before)
    for node in script.module.body:
        if not isinstance(node, cst.SimpleStatementLine) or len(node.body) != 1:
            continue
        small = node.body[0]
        if not isinstance(small, cst.Import | cst.ImportFrom) or isinstance(small.names, cst.ImportStar):
            continue
        gone = [alias for alias in small.names if _bound(alias) in then - now and not _is_prefix(script, alias, small)]
        if len(gone) == len(small.names):
            edits.removed.add(node)
        elif gone:
            kept = [alias for alias in small.names if alias not in gone]
            last = kept[-1].with_changes(comma=small.names[-1].comma)
            edits.replace(small, partial(_with_names, (*kept[:-1], last)), uses=False)
    return edits.apply().code


def drop_imports(edits: Edits, script: Script, names: Callable[[str], bool]) -> None:
    """Remove the imports of what was replaced, by its full name."""
    for node, _ in script.all(cst.ImportFrom):
        if isinstance(node.names, cst.ImportStar) or node.module is None:
            continue
        kept = [alias for alias in node.names if not names(f"{dotted(node.module)}.{dotted(alias.name)}")]
        if not kept:
            edits.remove(node)
        elif len(kept) < len(node.names):
            last = kept[-1].with_changes(comma=node.names[-1].comma)
            edits.replace(node, partial(_with_names, (*kept[:-1], last)), uses=False)


def _is_prefix(script: Script, alias: cst.ImportAlias, node: cst.Import | cst.ImportFrom) -> bool:
    """Return whether ``import torch.nn`` is needed since ``torch`` is used."""
    return isinstance(node, cst.Import) and alias.asname is None and "." in dotted(alias.name)


def _with_names(names: Sequence[cst.ImportAlias], node: cst.Import | cst.ImportFrom) -> cst.Import | cst.ImportFrom:
    return node.with_changes(names=names)


def _bound(alias: cst.ImportAlias) -> str:
    return dotted(alias.asname.name) if alias.asname is not None else dotted(alias.name).partition(".")[0]


def _used(script: Script) -> set[str]:
    """Return the names that are read anywhere but in imports."""
    found = set()
    for node, _ in script.all(cst.Name):
        if not any(isinstance(each, cst.Import | cst.ImportFrom) for each in script.ancestors(node)):
            parent = script.parents[node]
            if not (isinstance(parent, cst.Attribute) and parent.attr is node):
                found.add(node.value)
    return found


def _without_devices(text: str) -> str:
    """Remove ``device = lite.device`` where nothing reads it."""
    if not re.search(r"= \w+\.device$", text, re.MULTILINE):
        return text
    script = Script(text)
    edits = Edits(script)
    for node, _ in script.all(cst.Assign):
        target = node.targets[0].target
        if code(node.value).endswith(".device") and isinstance(target, cst.Name) and len(node.targets) == 1:
            uses = [each for each in script.mentions(target.value) if each is not target]
            if not uses:
                edits.remove(node)
    return edits.apply().code
