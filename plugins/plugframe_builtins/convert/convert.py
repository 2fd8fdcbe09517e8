"""Convert the source of a script: find out what it is written for, and apply the rules in passes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import libcst as cst

from plugframe_builtins.convert import (
    accelerate,
    devices,
    distributed,
    entry,
    fabric,
    files,
    metrics,
    outputs,
    precision,
    rank_zero,
    steps,
    unused,
)
from plugframe_builtins.convert.conversion import Conversion
from plugframe_builtins.convert.edits import BY_HAND, MARK
from plugframe_builtins.convert.roles import LITE
from plugframe_builtins.convert.script import Script


@dataclass(frozen=True)
class Mark:
    """A comment that the command wrote.

    Attributes:
        line: the line in the converted script that it is about.
        text: what it says.
    """

    line: int
    text: str

    @property
    def by_hand(self) -> bool:
        return self.text.startswith(BY_HAND)


@dataclass(frozen=True)
class Converted:
    """A converted script.

    Attributes:
        text: its source.
        kind: what it was written for: ``"plugframe"``, ``"raw"``, ``"fabric"``, ``"lite"``, ``"accelerate"`` or ``""``.
        marks: the comments in it.
    """

    text: str
    kind: str
    marks: tuple[Mark, ...]


def convert(text: str) -> Converted:
    """Convert a script.

    Raises:
        libcst.ParserSyntaxError: if it is not Python.
    """
    script = Script(text)
    kind = _kind(script)
    rules = {"raw": _raw, "fabric": fabric.convert, "lite": fabric.convert, "accelerate": accelerate.convert}
    result = rules[kind](script) if kind in rules else text
    compile(result, "converted", "exec", dont_inherit=True)
    return Converted(result, kind, _marks(result))


def _kind(script: Script) -> str:
    origins = {origin.partition(".")[0] for origin in script.imports.values()}
    names = {origin.rpartition(".")[2] for origin in script.imports.values()}
    attributes = {node.attr.value for node, _ in script.all(cst.Attribute)}
    if "plugframe" in origins:
        return "plugframe"
    if origins & {"lightning", "lightning_fabric", "pytorch_lightning", "lightning_lite"}:
        if "LightningLite" in names | attributes:
            return "lite"
        if "Fabric" in names | attributes or "lightning_fabric" in origins:
            return "fabric"
        return ""
    if "accelerate" in origins:
        return "accelerate"
    return "raw" if "torch" in origins else ""


def free_name(script: Script) -> str:
    """Return a name for the `Lite` object that the script does not use."""
    names = ("lite", "plugframe_lite")
    return next(name for name in (*names, *(f"lite_{index}" for index in range(2, 100))) if name not in script.names)


def _raw(script: Script) -> str:
    lite = free_name(script)
    c = Conversion(script, lite=lite, distributed=distributed.is_distributed(script))
    if distributed.spawned(c):
        c = _launching(c)
    distributed.convert(c)
    precision.convert(c)
    steps.set_up(c)
    steps.loaders(c)
    devices.convert(c)
    steps.backward(c)
    files.convert(c)
    metrics.convert(c)
    outputs.convert(c)
    if not c.trains:
        return script.module.code
    entry.convert(c)
    module = entry.add_import(c.edits.apply())
    return unused.convert(_rank_zero(module.code, lite), script)


def _launching(before: Conversion) -> Conversion:
    """Return the conversion of the script that launches its ranks with `Lite`."""
    script = Script(before.edits.apply().code)
    c = Conversion(script, lite=before.lite, distributed=before.distributed, launches=True)
    for scope in script.scopes:
        if any(each.value == "Lite" for each in scope.all(cst.Name)):
            c.roles.set(scope, c.lite, LITE)
    return c


def _rank_zero(text: str, lite: str) -> str:
    if not re.search("rank|main_process|is_global_zero", text):
        return text
    c = Conversion(Script(text), lite=lite)
    rank_zero.convert(c)
    return c.edits.apply().code


def _marks(text: str) -> tuple[Mark, ...]:
    lines = text.splitlines()
    found = []
    for index, line in enumerate(lines):
        match = re.match(rf"\s*{re.escape(MARK)}(.*)", line)
        if match:
            following = (n for n in range(index + 1, len(lines)) if not lines[n].lstrip().startswith("#"))
            found.append(Mark(next(following, index) + 1, match[1]))
    return tuple(found)
